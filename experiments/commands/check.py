"""``clipbench check``. Clippings held to the laws."""

from __future__ import annotations

from experiments.errors import UserError, nearest


def main(argv: list[str]) -> int:
    import argparse

    from torch_clip.methods import CLIPPINGS
    from torch_clip.testing import LAWS, SLOW, check

    parser = argparse.ArgumentParser(
        prog="clipbench check",
        description="Hold clippings to the laws: ours by name, any other as my_module.MyClip.",
    )
    parser.add_argument("name", nargs="*", default=list(CLIPPINGS), help="default: every method of ours")
    parser.add_argument("--fast", action="store_true", help="leave out the laws that start processes")
    args = parser.parse_args(argv)
    laws = [law for law in LAWS if not (args.fast and law in SLOW)]
    failed = False
    for name, make in [(name, _clipping_class(name)) for name in args.name]:
        try:
            verdicts = check(make, laws)
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}: {error}") from None
        print(name)
        for verdict in verdicts:
            told = verdict.message or LAWS[verdict.law].__doc__.splitlines()[0]
            print(f"  {verdict.status:<11}  {verdict.law:<18}  {told}", flush=True)
            failed = failed or verdict.status == "failed"
    return int(failed)


def _clipping_class(name: str):
    """A method of ours by its name, or what a dotted path names; modules are looked for here first."""
    import importlib

    from torch_clip.methods import CLIPPINGS

    if name in CLIPPINGS:
        return CLIPPINGS[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise UserError(
            f"there is no clipping {name!r}; choose one of {', '.join(CLIPPINGS)}, or give my_module.MyClip."
            f"{nearest(name, CLIPPINGS)}"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise UserError(f"{name}: there is no module {error.name!r} here or installed") from None
    except AttributeError:
        raise UserError(f"{name}: {module} has no {attribute!r}") from None
