"""Published checkpoints: where they live, how they are laid out, under which licence.

Nothing is downloaded unless `fetch` is called; every loader takes a path.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from varzoo.core.errors import unknown

WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Published:
    """One released file.

    Args:
        config: the config it belongs to: a name under `configs/tokenizer` or `configs/model`, of drafters under
            `configs/generator`.
        repo: repository on the Hugging Face hub, None where it is published elsewhere.
        file: file name there; None where its authors do not say it, the repository then holds one file of weights.
        layout: its layout, a name of the model's `key_maps()`.
        licence: of the weights.
        tokenizer: of a generator: the published tokenizer it was trained with, None if it is not in varzoo.
        note: what else a user needs to know.
        companions: other files of the repository that are read with it, if they are there.
    """

    config: str
    repo: str | None
    file: str | None
    layout: str
    licence: str
    tokenizer: str | None = None
    note: str = ""
    companions: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Where the file is, in words."""
        file = self.file or "the weights"
        return f"{file} of {self.repo} on the Hugging Face hub" if self.repo else f"{file}, {self.note}"


def _llamagen(config: str, file: str, repo: str = "FoundationVision/LlamaGen",
              tokenizer: str | None = "vq16") -> Published:
    return Published(config=config, repo=repo, file=file, layout="llamagen", licence="MIT", tokenizer=tokenizer)


def _flextok(config: str, name: str) -> Published:
    return Published(config=config, repo=f"EPFL-VILAB/{name}", file=None, companions=("config.json",),
                     layout="diffusers" if "vae" in name else "flextok",
                     licence="Apple ML Research Model (not for commercial use)",
                     note="file names there are not verified")


def _elm(config: str, file: str, tokenizer: str | None = None) -> Published:
    return Published(config=config, repo="xuantonglll/ELM", file=file, layout="elm", licence="not stated",
                     tokenizer=tokenizer)


def _rq(config: str, tokenizer: str | None = None) -> Published:
    return Published(
        config=config, repo=None, file="the checkpoint", layout="rqvae", licence="CC-BY-NC-SA 4.0", tokenizer=tokenizer,
        note="in a tar.gz that the official README links to; extract it, the averaged weights under state_dict_ema are "
             "used where there are any")


def _nar(config: str, repo: str, tokenizer: str = "vq16") -> Published:
    return Published(config=config, repo=repo, file=None, layout="nar", licence="not stated", tokenizer=tokenizer)


ELM_SPLITS = {"l": ((1, 16), (2, 8), (2, 10), (2, 12)), "xl": ((1, 16), (2, 8), (2, 10), (2, 12)),
              "xxl": ((1, 16), (2, 10), (2, 12)), "2b": ((2, 12),)}  # groups of bits
PUBLISHED = {
    "vq16": _llamagen("vq16", "vq_ds16_c2i.pt", tokenizer=None),
    "vq8": _llamagen("vq8", "vq_ds8_c2i.pt", tokenizer=None),
    "vq16_t2i": _llamagen("vq16", "vq_ds16_t2i.pt", "peizesun/llamagen_t2i", None),
    "llamagen_b": _llamagen("llamagen_b", "c2i_B_256.pt"),
    "llamagen_b_384": _llamagen("llamagen_b_384", "c2i_B_384.pt"),
    "llamagen_l": _llamagen("llamagen_l", "c2i_L_256.pt"),
    "llamagen_l_384": _llamagen("llamagen_l_384", "c2i_L_384.pt"),
    "llamagen_xl_384": _llamagen("llamagen_xl_384", "c2i_XL_384.pt"),
    "llamagen_xxl_384": _llamagen("llamagen_xxl_384", "c2i_XXL_384.pt"),
    "llamagen_3b_384": _llamagen("llamagen_3b_384", "c2i_3B_384.pt"),
    "llamagen_xl_t2i": _llamagen("llamagen_xl_t2i", "t2i_XL_stage1_256.pt", "peizesun/llamagen_t2i",
                                 "vq16_t2i"),
    "llamagen_xl_t2i_512": _llamagen("llamagen_xl_t2i_512", "t2i_XL_stage2_512.pt", "peizesun/llamagen_t2i",
                                     "vq16_t2i"),
    **{f"{name}_lantern": Published(
        config=name, repo=f"jadohu/LlamaGen-T2I{stage}", file=None, layout="lantern", licence="not verified",
        tokenizer="vq16_t2i", note=f"the weights of {name} as LANTERN lays them out")
       for name, stage in (("llamagen_xl_t2i", ""), ("llamagen_xl_t2i_512", "-2"))},
    **{f"drafter_{name}": Published(
        config=f"drafter_{config}", repo=f"jadohu/{repo}", file=None, layout="eagle", licence="not verified",
        note=f"EAGLE-style drafter of {name}, for sampler=lantern")
       for name, config, repo in (("llamagen_xl_t2i", "llamagen_xl", "llamagen_drafter"),
                                  ("llamagen_xl_t2i_512", "llamagen_xl_512", "llamagen2_drafter"))},
    **{f"dar_{size}": Published(
        config=f"dar_{size}", repo="showlab/D-AR", file=f"D-AR-{size.upper()}-360K.pt", layout="llamagen",
        licence="MIT (of the repository)", tokenizer="dar_v1") for size in ("l", "xl")},
    "dar_v1": Published(config="dar_v1", repo="showlab/D-AR", file="D-AR-tokenizer_v1.pt", layout="dar",
                        licence="MIT (of the repository)", note="the averaged weights under ema are used"),
    **{f"nar_{size}": _nar(f"nar_{size}", f"{owner}/NAR-imagenet-256-{size.upper()}")
       for owner, sizes in (("chenfeng1271", ("b", "l", "xxl")), ("yefly", ("m", "xl"))) for size in sizes},
    "nar_xl_t2i": _nar("nar_xl_t2i", "yefly/NAR-XL-t2i-stage1", "vq16_t2i"),
    "nar_xl_t2i_512": _nar("nar_xl_t2i_512", "yefly/NAR-XL-t2i-stage2", "vq16_t2i"),
    **{name: _flextok("_".join(name.split("_")[:3]), name)
       for name in ("flextok_d12_d12_in1k", "flextok_d18_d18_in1k", "flextok_d18_d28_in1k", "flextok_d18_d28_dfn")},
    **{f"flextok_vae_{channels}": _flextok(f"kl8_{channels}", f"flextok_vae_{channels}")
       for channels in ("c4", "c8", "c16")},
    "kl16": Published(config="kl16", repo="jadechoghari/mar", file="kl16.ckpt", layout="mar", licence="MIT",
                      note="a mirror named by the official README; file names there are not verified"),
    **{f"mar_{size}": Published(
        config=f"mar_{size}", repo=None, file="checkpoint-last.pth", layout="mar", licence="MIT",
        tokenizer="kl16", note="linked from the official README; the averaged weights under model_ema are used")
       for size in "blh"},
    **{f"tokenbridge_{size}": Published(
        config=f"tokenbridge_{size}", repo="Epiphqny/TokenBridge",
        file=f"tokenbridge/tokenbridge_{name}/checkpoint-last.pth", layout="tokenbridge", licence="not verified",
        tokenizer="kl16", note="the averaged weights under model_ema are used; the file's name within its folder is "
                               "not verified") for size, name in (("l", "large"), ("h", "huge"))},
    **{f"xar_{size}": Published(
        config=f"xar_{size}", repo="OliverRen/xAR", file=f"xAR-{size.upper()}.pth", layout="xar", licence="not stated",
        tokenizer="kl16") for size in "blh"},
    **{f"flowar_{size}": Published(
        config=f"flowar_{size}", repo="OliverRen/FlowAR", file=f"FlowAR-{size.upper()}.pth", layout="flowar",
        licence="not stated", tokenizer="kl16") for size in "slh"},
    **{f"himar_{size}": Published(
        config=f"himar_{size}", repo="HiDream-ai/Hi-MAR", file=f"Hi-MAR-{size.upper()}/checkpoint-last.pth",
        layout="himar", licence="not stated", tokenizer="kl16",
        note="the averaged weights under model_ema are used") for size in "blh"},
    "rq_f32": _rq("rq_f32"),
    **{f"rq_{size}": _rq(f"rq_{size}", "rq_f32") for size in ("480m", "821m", "1_4b", "3_8b")},
    **{f"bae_{bits}": _elm(f"bae_{bits}", f"bae/bae_{bits}/binaryae_ema.th") for bits in (16, 20, 24)},
    **{f"elm_{size}_{groups}_{bits}": _elm(f"elm_{size}_{groups}_{bits}", f"gpt/{size.upper()}-{groups}-{bits}.pth",
                                           f"bae_{groups * bits}")
       for size, splits in ELM_SPLITS.items() for groups, bits in splits},
    **{f"elm_mlm_{size}": _elm(f"elm_mlm_{size}", f"gpt/mlm{size.upper()}-1-16.pth", "bae_16")
       for size in ("l", "xl", "xxl")},
}


def fetch(name: str, cache: str | Path | None = None) -> Path:
    """Download a published file (or find it in the hub's cache) and return its path.

    Raises:
        ValueError: the name is unknown, or the file is not on the hub.
    """
    if name not in PUBLISHED:
        raise unknown("published checkpoint", name, PUBLISHED)
    published = PUBLISHED[name]
    if published.repo is None:
        raise ValueError(f"{name} is not on the hub ({published.note}): download {published.file} by hand and give its "
                         "path as checkpoint=FILE.")
    from huggingface_hub import hf_hub_download, list_repo_files  # only where something is to be downloaded

    file = published.file
    if file is None:
        found = [entry for entry in list_repo_files(published.repo) if Path(entry).suffix in WEIGHTS]
        if len(found) != 1:
            raise ValueError(f"{published.repo} should hold one file of weights, but holds {len(found)} "
                             f"({', '.join(found)}): download the right one and give its path as checkpoint=FILE.")
        file = found[0]
    for companion in published.companions:
        if companion in list_repo_files(published.repo):
            hf_hub_download(published.repo, companion, cache_dir=cache)
    return Path(hf_hub_download(published.repo, file, cache_dir=cache))
