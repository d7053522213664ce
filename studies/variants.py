"""The variants of the Fashion-MNIST study: their training flags, and the tables that compare them."""

import re
from dataclasses import dataclass

# For each setting: side of the images in pixels, and patch size of the models.
SETTINGS = {"pixels": (16, 4), "latents": (32, 2)}
# For each number that table 4 varies: its value in the other tables, and the others.
STEPS, OTHER_STEPS = 5_000, (1_250, 2_500, 10_000, 20_000)
WIDTH, OTHER_WIDTHS = 48, (24, 96, 192)
# A loss weight: Min-SNR, but at least 0.2.
WEIGHTED = dict(min_snr=5, min_weight=0.2)


def remix(k: int, n: int, **values) -> dict:
    """Return the training flags of a Remix-DiT with k bases and n experts, by default with the published prior."""
    return dict(n_basis=k, n_experts=n, prior_bonus=3) | values


def power_boundaries(n_experts: int, power: float) -> list[int]:
    """Return the N + 1 boundaries 1000 (i / N)^power, rounded. With powers above 1, intervals grow with the noise."""
    return [round(1000 * (i / n_experts) ** power) for i in range(n_experts + 1)]


# The training flags of each variant. Three keys are no flags: "width"; "length", the number of fine-tuning steps
# relative to the other variants; and "flops", the FLOPs of a step with the mixing, relative to a plain DiT's, by which
# the number of steps is divided. 128 images cannot be divided among 20 experts: that variant has more steps of 120.
VARIANTS = {
    "pretrained": {},
    "continued": {},
    "independent-8": {},
    "remix-4-8": remix(4, 8),
    "remix-4-20": remix(4, 20),
    "remix-4-8-equal-flops": remix(4, 8, flops=1.01406),
    "remix-4-20-equal-flops": remix(4, 20, flops=1.02811),
    **{f"experts-per-batch-{e}": remix(4, 20, experts_per_batch=e) for e in (1, 4, 8)},
    "experts-per-batch-20": remix(4, 20, experts_per_batch=20, global_batch_size=120),
    "one-hot": remix(4, 20, mixer="one-hot"),
    "raw": remix(4, 20, mixer="raw"),
    "local": remix(4, 20, mixer_scope="local"),
    "modulation-too": remix(4, 20, mix_modulation=True),
    **{f"remix-{k}-{n}": remix(k, n) for k, n in ((2, 20), (8, 20), (4, 100))},
    "no-prior": remix(4, 20, prior_bonus=0, prior_strength=0),
    "strength-0": remix(4, 20, prior_strength=0),
    "strength-1e-2": remix(4, 20, prior_strength=1e-2),
    "coefficients-to-1e-5": remix(4, 20, coeff_lr_end=1e-5),
    "recipe-paper": dict(n_basis=4, n_experts=20, recipe="paper"),
    **{f"rank-{r}": remix(4, 20, rank=r) for r in (4, 8, 16)},
    # Ideas that go past the paper.
    **{f"bonus-{bonus}": remix(4, 20, prior_bonus=bonus) for bonus in (0, 5, 8, 12)},
    "bonus-8-coefficients-1e-3": remix(4, 20, prior_bonus=8, coeff_lr=1e-3),
    "bonus-8-local": remix(4, 20, prior_bonus=8, mixer_scope="local"),
    "bonus-8-8-20": remix(8, 20, prior_bonus=8),
    "continued-min-snr-5": dict(min_snr=5),
    **{f"bonus-8-min-snr-{gamma}": remix(4, 20, prior_bonus=8, min_snr=gamma) for gamma in (5, 50)},
    "continued-weighted": WEIGHTED,
    "independent-8-weighted": WEIGHTED,
    "bonus-8-weighted": remix(4, 20, prior_bonus=8, **WEIGHTED),
    # The lengths of the intervals of the least and of the most noise are 11 and 74 timesteps, or 136 and 34.
    "bonus-8-fine-at-low-noise": remix(4, 20, prior_bonus=8, boundaries=power_boundaries(20, 1.5)),
    "bonus-8-fine-at-high-noise": remix(4, 20, prior_bonus=8, boundaries=power_boundaries(20, 1 / 1.5)),
    # A plain DiT with the same training timesteps, in groups of one interval: with one basis, all experts are the same.
    "continued-fine-at-low-noise": remix(1, 20, boundaries=power_boundaries(20, 1.5)),
    "independent-8-fine-at-low-noise": dict(boundaries=power_boundaries(8, 1.5)),
    **{f"continued-steps-{steps}": dict(length=steps / STEPS) for steps in OTHER_STEPS},
    **{f"remix-4-20-steps-{steps}": remix(4, 20, length=steps / STEPS) for steps in OTHER_STEPS},
    **{
        f"{name}-width-{width}": values | dict(width=width)
        for width in OTHER_WIDTHS
        for name, values in {
            **{name: {} for name in ("pretrained", "continued", "independent-8")},
            "remix-4-20": remix(4, 20),
            "bonus-8": remix(4, 20, prior_bonus=8),
        }.items()
    },
}


def baseline(name: str) -> str:
    """Return the name of the continued training that a variant is compared with."""
    suffix = re.search(r"-(steps|width)-\d+$", name)
    return "continued" + (suffix[0] if suffix else "")


@dataclass(frozen=True)
class Table:
    """A table of the study. Each of its parts also has the pretrained model and continued training.

    Attributes:
        parts: for each title, the names of the variants, separated by spaces.
        paired: variants that are compared seed by seed with others that have the same baseline.
        others: these others; None for the variants of the same part.
        split: the images of the errors and of FID, "test" or "validation".
        all_seeds: whether the variants may have different numbers of seeds. If not, those with the same baseline are
            reduced to the seeds that all of them have.
    """

    parts: dict[str, str]
    paired: tuple[str, ...] = ()
    others: tuple[str, ...] | None = None
    split: str = "test"
    all_seeds: bool = True


IN_TABLE_1 = "independent-8 remix-4-8 remix-4-20 experts-per-batch-1 remix-4-8-equal-flops remix-4-20-equal-flops"
IN_TABLE_6 = (
    "independent-8 recipe-paper remix-4-20 bonus-8 bonus-8-fine-at-low-noise continued-fine-at-low-noise "
    "independent-8-fine-at-low-noise continued-weighted independent-8-weighted bonus-8-weighted"
)
# The variants that are scored with both networks.
MAIN = tuple(dict.fromkeys(["pretrained", "continued", *IN_TABLE_1.split(), *IN_TABLE_6.split()]))
BEST = ("bonus-8", "bonus-8-fine-at-low-noise", "bonus-8-weighted")
METHODS = ("independent-8", "remix-4-20", "bonus-8")
TABLES = {
    1: Table(
        {"Table 1: the same number of images, and the same FLOPs for `-equal-flops`": IN_TABLE_1},
        paired=("remix-4-20",),
        others=("pretrained", "continued", *IN_TABLE_1.split()),
    ),
    2: Table(
        {
            "Table 2: mixers": "remix-4-20 raw one-hot",
            "Table 2: scopes and mixed layers": "remix-4-20 local modulation-too",
            "Table 2: K and N": "remix-4-8 remix-4-20 remix-4-100 remix-2-20 remix-8-20",
            "Table 2: prior": "remix-4-20 no-prior bonus-0 bonus-8 strength-0 strength-1e-2",
            "Table 2: final rate of the coefficients (that of remix-4-20 is 5e-4)": "remix-4-20 coefficients-to-1e-5",
            "Table 2: `--recipe paper`, but with the study's learning rate of 1e-3": "remix-4-20 recipe-paper",
            "Table 2: experts per batch (remix-4-20 has 16)": (
                "experts-per-batch-1 experts-per-batch-4 experts-per-batch-8 remix-4-20 experts-per-batch-20"
            ),
        },
        paired=("remix-4-20",),
    ),
    3: Table({"Table 3: low-rank bases": "remix-4-20 rank-4 rank-8 rank-16"}, all_seeds=False),
    4: Table(
        {
            "Table 4: number of fine-tuning steps, elsewhere 5,000; the baseline is continued training for as many "
            "steps": " ".join(
                ["remix-4-20", *(f"{name}-steps-{n}" for n in OTHER_STEPS for name in ("continued", "remix-4-20"))]
            ),
            "Table 4: width of the model, elsewhere 48; the baseline is continued training of the same width": " ".join(
                [*METHODS, *(f"{m}-width-{w}" for w in OTHER_WIDTHS for m in ("pretrained", "continued", *METHODS))]
            ),
        },
        paired=tuple(f"{name}-width-{width}" for width in OTHER_WIDTHS for name in ("remix-4-20", "bonus-8")),
        all_seeds=False,
    ),
    5: Table(
        {
            "Table 5: ideas past the paper, on validation images": (
                "remix-4-20 one-hot recipe-paper bonus-5 bonus-8 bonus-12 bonus-8-coefficients-1e-3 bonus-8-local "
                "bonus-8-8-20 bonus-8-fine-at-low-noise continued-fine-at-low-noise independent-8-fine-at-low-noise "
                "bonus-8-fine-at-high-noise continued-min-snr-5 bonus-8-min-snr-5 bonus-8-min-snr-50 "
                "continued-weighted independent-8-weighted bonus-8-weighted"
            )
        },
        paired=BEST,
        others=MAIN,
        split="validation",
    ),
    6: Table({"Table 6: the best ideas of table 5, on test images": IN_TABLE_6}, paired=BEST, others=MAIN),
}
