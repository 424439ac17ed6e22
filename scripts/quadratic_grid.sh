#!/bin/sh
# All methods on the quadratic with heavy-tailed and with Gaussian noise: learning rate by threshold, three seeds.
# Finished runs are not run again. About 850 runs of 2,000 steps: half an hour on one core.
set -e
sweep() {
    clipbench run -m experiment=quadratic_grid task.noise=${NOISE:-student,gaussian} \
        optimizer.lr=0.01,0.03,0.1 seed=0,1,2 "$@"
}
sweep clipping=norm,linear_rand_norm,quadratic_rand_norm,layer_wise,coordinate_wise,smooth,smooth_sqrt,uclip,agc \
    clipping.threshold=0.3,1.0,3.0
sweep clipping=auto_clip,linear_rand_autoclip,quadratic_rand_autoclip,layer_wise_autoclip \
    clipping.percentile=0.25,0.75
sweep clipping=normalized clipping.norm=0.3,1.0,3.0
sweep clipping=spam clipping.theta=5000.0,9.0
sweep clipping=no_clip,zclip,adagc,adaclip,adagn,stable_spam,spike_guard
clipbench list runs --experiment quadratic_grid --columns optimizer.lr --out results/quadratic_grid \
    --rows 'task.noise,clipping,clipping.threshold|clipping.percentile|clipping.norm|clipping.theta'
