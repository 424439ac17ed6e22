#!/bin/sh
# Makes the published studies anew: scripts/reproduce.sh [STUDY ...]; results/README.md names them, says how long each
# takes on two cores, and what must lie in .data/. Finished runs are not run again.
set -e
export OMP_NUM_THREADS=1

run() {
    clipbench run -m hydra/launcher=joblib "hydra.launcher.n_jobs=${JOBS:-2}" "$@"
}

# EXPERIMENT LR: no clipping with Adam, tuned as the experiment tunes the methods
adam() {
    run "experiment=$1" optimizer=adam 'hydra.sweeper.methods=[no_clip]' \
        "hydra.sweeper.space={optimizer.lr:'tag(log,interval($2))'}"
}

# EXPERIMENT REFERENCE SEEDS [OPTION ...]: the tables of a tuned experiment
publish() {
    experiment=$1 reference=$2 seeds=$3
    shift 3
    clipbench compare --experiment "$experiment" --tuned-at "$seeds" --reference "$reference" "$@" \
        --tables --out "results/$experiment"
}

mini_comparison() {
    run experiment=mini_comparison preset=mini task=cola,imagenet,voc,reddit seed=0,1 \
        clipping=no_clip,norm,linear_rand_norm,quadratic_rand_norm,layer_wise,coordinate_wise,auto_clip,linear_rand_autoclip,quadratic_rand_autoclip
    clipbench compare --experiment mini_comparison --tables --out results/mini_comparison
}

regression() {
    for method in sgd adam clipped_sgd sstm; do
        run experiment=regression_$method seed=0,1,2,3,4 task.data_seed=0,1,2 keep=none quiet=true
    done
    run 'hydra.searchpath=[file://scripts/conf]' experiment=regression_clipped_momentum seed=0,1,2,3,4 task.data_seed=0,1,2 \
        keep=none quiet=true
    run experiment=regression
    adam regression 1e-5,1e-1
    run experiment=regression optimizer=sstm 'hydra.sweeper.methods=[norm]' optimizer.L=1.0 \
        optimizer.a_k_ratio_upper_bound=1.0
    publish regression "sgd no_clip" 0,1
}

expectation() {
    run experiment=expectation preset=mini task.noise=normal,exponential,weibull,burr clipping=no_clip,norm \
        seed=0,1,2,3,4
    for metric in median max; do  # of the loss over the second half
        clipbench compare --experiment expectation --metric $metric --tables --out results/expectation/$metric
    done
}

quadratic() {
    noisy="experiment=quadratic_grid task.noise=student,gaussian"
    grid="$noisy optimizer.lr=0.01,0.03,0.1,0.3 seed=0,1,2,3,4"
    strength="clipping.threshold|clipping.percentile|clipping.norm|clipping.theta|clipping.z_threshold"
    strength="$strength|clipping.relative|clipping.sigma"
    run $grid clipping=no_clip
    run $grid clipping.threshold=0.3,1.0,3.0 \
        clipping=norm,linear_rand_norm,quadratic_rand_norm,layer_wise,coordinate_wise
    run $noisy optimizer.lr=3.0 seed=0,1,2,3,4 clipping=no_clip
    run $noisy optimizer.lr=3.0 seed=0,1,2,3,4 clipping.threshold=0.3,1.0,3.0 \
        clipping=norm,linear_rand_norm,quadratic_rand_norm,layer_wise,coordinate_wise
    run $grid clipping=auto_clip,linear_rand_autoclip,quadratic_rand_autoclip clipping.percentile=0.25,0.75
    run $grid clipping.threshold=0.3,1.0,3.0 clipping=smooth,smooth_sqrt
    run $grid clipping.threshold=0.1,0.3,1.0 clipping=uclip
    run $grid clipping.threshold=0.01,0.1,1.0 clipping=agc
    run $grid clipping.norm=0.3,1.0,3.0 clipping=normalized
    run $grid clipping.percentile=0.25,0.75 clipping=layer_wise_autoclip
    run $grid clipping.z_threshold=1.0,2.5,6.0 clipping=zclip
    run $grid clipping.relative=1.05,1.5,3.0 clipping=adagc
    run $grid clipping.theta=0.9,0.99,0.999 clipping=adaclip,stable_spam
    run $grid clipping.theta=3.0,30.0,5000.0 clipping=spam
    run $grid clipping.sigma=1.0,3.0,6.0 clipping=spike_guard
    run $grid clipping=adagn
    for noise in student gaussian; do
        run experiment=tune_quadratic task.noise=$noise
        run experiment=tune_quadratic_newer task.noise=$noise
        run experiment=tune_quadratic_newer task.noise=$noise 'hydra.sweeper.methods=[adaclip,stable_spam]' \
            "hydra.sweeper.space={clipping.theta:'interval(0.5,0.9999)'}"
    done
    clipbench list runs --experiment quadratic_grid --columns optimizer.lr --out results/quadratic_grid \
        --rows "task.noise,clipping,$strength"
    clipbench compare --experiment tune_quadratic --tuned-at 0-2 --tables --out results/quadratic_grid
    clipbench compare --experiment tune_quadratic_newer --tuned-at 0-2 --tables --out results/quadratic_grid/newer
}

cola() {
    head="preset=frozen task.body=cached task.model.name_or_path=.data/minilm"
    for method in sgd adam clipped_sgd; do
        run experiment=cola_$method seed=0,1,2,3,4,5,6,7,8,9 $head data_dir=.data/cola_public/cola_public \
            max_steps=1790 eval_every=179 keep=last quiet=true
    done
    run experiment=cola_sstm seed=0,1,2,3,4,5,6,7,8,9 $head data_dir=.data/cola_public/cola_public \
        max_steps=223 eval_every=22 keep=last quiet=true
    run experiment=cola
    adam cola 1e-4,1e-1
    publish cola "sgd no_clip" 0,1
    clipbench tails task=cola $head data_dir=.data/cola_public/cola_public out=results/cola/tails_before
    run experiment=cola_adam_tuned $head data_dir=.data/cola_public/cola_public \
        max_steps=1790 eval_every=179 keep=last quiet=true
    clipbench tails checkpoint="$(echo results/runs/cola_adam_tuned/cola-frozen/adam-no_clip/*/seed=0)" \
        data_dir=.data/cola_public/cola_public out=results/cola/tails_after
}

imagenet() {
    run experiment=imagenet
    adam imagenet 1e-4,1e-1
    publish imagenet "sgd no_clip" 0,1
    clipbench tails task=imagenet preset=subset data_dir=.data/imagenet_subset out=results/imagenet/tails
}

voc() {
    run experiment=voc
    adam voc 1e-4,1e-1
    publish voc "sgd no_clip" 0,1 --metric loss
}

reddit() {
    run experiment=reddit
    adam reddit 1e-4,1e-1
    publish reddit "sgd no_clip" 0,1
    clipbench tails task=reddit preset=subset data_dir=.data/graph_github_redditformat out=results/reddit/tails
}

reddit_sum() {
    run experiment=reddit_sum
    adam reddit_sum 1e-5,1e-1
    publish reddit_sum "sgd no_clip" 0,1
    clipbench tails task=reddit preset=subset data_dir=.data/graph_github_redditformat task.model.aggr=add out=results/reddit_sum/tails
}

cost() {
    clipbench bench --threads 2 --rounds 7
    clipbench bench --threads 1 --rounds 15 --models resnet18,bert-base \
        --methods norm,auto_clip,layer_wise,coordinate_wise --out results/bench_one_thread
}

for study in ${@:-mini_comparison expectation regression quadratic cola imagenet voc reddit reddit_sum cost}; do
    $study
done
clipbench figures
