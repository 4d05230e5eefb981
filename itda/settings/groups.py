"""Every setting, said once: its name, type, default, help, range, and whether a dictionary keeps it.

To add one, write it into the group it belongs to; `verbs` says who takes which group. Functions, `help`, the command
line and sweeps have it from here. A group's docstring is the heading that its settings have in
`--help-all` and in docstrings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypedDict

from itda.settings.declare import Setting, groups

# -- what is read -----------------------------------------------------------------------------------------------------


class Places(TypedDict, total=False):
    """Where and how much"""

    layer: Annotated[
        int | Sequence[int] | None,
        Setting(None, "read the residual stream after this block (-1 is the last), or after each of several"),
    ]
    hook: Annotated[
        str | Sequence[str] | None,
        Setting(None, "read here instead: a module path (model.layers.8.mlp) or a TransformerLens name"),
    ]


class Amount(TypedDict, total=False):
    """Where and how much"""

    tokens: Annotated[int | None, Setting(None, "stop reading after so many tokens", least=1)]


class Rows(TypedDict, total=False):
    """Text rows"""

    context_length: Annotated[int, Setting(128, "tokens in a row", least=1, kept=True)]
    truncate: Annotated[bool, Setting(False, "use only the first row of each document (a .txt is one)", kept=True)]
    pack: Annotated[bool, Setting(False, "join all documents into one", kept=True)]
    bos: Annotated[
        Literal["auto", "always", "never"] | None,
        Setting(
            "auto", "open rows with BOS: auto where the tokenizer does so itself; always where it has one", kept=True
        ),
    ]


class Order(TypedDict, total=False):
    """Text rows"""

    seed: Annotated[int | None, Setting(None, "shuffle the rows, with this seed", least=0, kept=True)]


class Source(TypedDict, total=False):
    """Text rows"""

    column: Annotated[str, Setting("text", "the column that holds the text of a record", kept=True)]
    split: Annotated[
        str | None,
        Setting(None, "the split of a data set; train if not given, and all of a folder without one", kept=True),
    ]
    config: Annotated[str | None, Setting(None, "the configuration of a data set", kept=True)]
    data_revision: Annotated[str | None, Setting(None, "branch, tag or commit of a data set on the hub", kept=True)]


class Batches(TypedDict, total=False):
    """Text rows"""

    batch_rows: Annotated[int, Setting(32, "rows that go through the model together", least=1, kept=True)]


class Special(TypedDict, total=False):
    """Text rows"""

    special_tokens: Annotated[bool, Setting(False, "use special tokens and position 0 too", kept=True)]


class Padding(TypedDict, total=False):
    """Text rows"""

    padding: Annotated[bool, Setting(False, "fill rows up, and read the filling like text", kept=True)]


# -- which model ------------------------------------------------------------------------------------------------------

DTYPE = Setting("auto", "type of the model's numbers: auto, float32, bfloat16 or float16", flag=str)


class Tokenizer(TypedDict, total=False):
    """Model loading"""

    tokenizer: Annotated[Any, Setting(None, "the tokenizer, where it is not the model's: id or folder", flag=str)]


class Device(TypedDict, total=False):
    """Model loading"""

    dtype: Annotated[Any, DTYPE]
    device: Annotated[Any, Setting(None, "cpu, cuda, ...; the fastest there is if not given", flag=str)]
    trust_remote_code: Annotated[bool, Setting(False, "run code that the model's repository brings")]


class Revision(TypedDict, total=False):
    """Model loading"""

    revision: Annotated[str | None, Setting(None, "branch, tag or commit of the model")]


class Backend(TypedDict, total=False):
    """Model loading"""

    backend: Annotated[
        Literal["hooks", "nnsight"], Setting("hooks", "what reads the model; the activations are the same")
    ]
    remote: Annotated[bool | str, Setting(False, "read it on NDIF, with nnsight; needs NDIF_API_KEY", flag=bool)]


class Large(TypedDict, total=False):
    """Model loading"""

    device_map: Annotated[
        Any, Setting(None, "auto spreads the model over GPUs, memory and disk, with accelerate", flag=str)
    ]
    tensor_parallel: Annotated[
        int | None, Setting(None, "share every block between so many GPUs of this machine, a process for each", least=1)
    ]
    stream_layers: Annotated[
        bool | None,
        Setting(
            None,
            "load the model block by block; done by itself where it does not fit into memory",
            off="load the model whole in any case",
        ),
    ]
    state_gb: Annotated[
        float | None,
        Setting(None, "disk for hidden states of a streamed model, in 10^9 bytes; half of what is free if not given"),
    ]
    state_dir: Annotated[Any, Setting(None, "folder for the hidden states of a streamed model", flag=None)]


class Transformers(TypedDict, total=False):
    """Model loading"""

    max_memory: Annotated[
        Any, Setting(None, "memory of each device, for `device_map`, as transformers takes it", flag=None)
    ]
    offload_folder: Annotated[Any, Setting(None, "folder for weights that `device_map` puts on disk", flag=None)]
    quantization_config: Annotated[Any, Setting(None, "how transformers is to quantise the model", flag=None)]
    attn_implementation: Annotated[Any, Setting(None, "which attention transformers is to use", flag=None)]


# -- how a dictionary grows -------------------------------------------------------------------------------------------

STEPS = Setting(40, "pursuit steps for each token, the L0 budget", least=1)


class Steps(TypedDict, total=False):
    """Dictionary growth"""

    k: Annotated[int, STEPS]


SIGNS = Setting(False, "take the largest correlation, not the largest absolute one: no coefficient is negative")


class Signs(TypedDict, total=False):
    """Dictionary growth"""

    nonneg: Annotated[bool, SIGNS]


class Size(TypedDict, total=False):
    """Dictionary growth"""

    threshold: Annotated[
        float | None,
        Setting(None, "admit a token whose loss exceeds this; 0.2 if not given, 4e-4 with the cosine loss"),
    ]
    n_atoms: Annotated[int | None, Setting(None, "aim at so many atoms instead of at a threshold", least=1)]


ADMISSION = Setting(
    "sequential",
    "one token after another; a batch at a time; paper, as the published code does; or online: n_atoms tokens are "
    "drawn at the start and moved by all that come",
)


class Growth(TypedDict, total=False):
    """Dictionary growth"""

    loss: Annotated[
        Literal["relative", "cosine", "squared"],
        Setting("relative", "|x - x_hat|^2 / |x|^2 of x less the mean; the published code's; or |x - x_hat|^2"),
    ]
    admission: Annotated[Literal["sequential", "batch", "paper", "online"] | None, ADMISSION]
    center: Annotated[bool, Setting(True, "subtract the mean of the first tokens, massive ones left out of it")]
    max_norm: Annotated[
        float | None,
        Setting(None, "never admit a token whose |x| is beyond so many times the median norm; 5 for massive ones"),
    ]
    scale: Annotated[
        Literal["none", "std", "sqrt"],
        Setting(
            "none", "divide each coordinate by its deviation (std) or the root of that (sqrt), in loss and pursuit"
        ),
    ]
    max_atoms: Annotated[int | None, Setting(None, "stop at so many atoms", least=1)]
    chunk_size: Annotated[
        int, Setting(4096, "tokens encoded together; changes memory and speed, never the result", least=1)
    ]


class Preset(TypedDict, total=False):
    """Dictionary growth"""

    preset: Annotated[
        Literal["paper"] | None,
        Setting(
            None, "the published code's practice: cosine loss, its admission, truncated and padded rows, 128 at once"
        ),
    ]


class Improvement(TypedDict, total=False):
    """Dictionary growth"""

    candidates: Annotated[
        int, Setting(1, "build a dictionary of so many times n_atoms, and keep the most useful atoms", least=1)
    ]
    refine: Annotated[
        int, Setting(0, "move the atoms in so many passes: less error, but no longer real activations", least=0)
    ]
    refine_tokens: Annotated[int, Setting(200_000, "tokens, read once more, to choose and move atoms by", least=1)]


# -- how sparse autoencoders are trained ------------------------------------------------------------------------------


class Autoencoder(TypedDict, total=False):
    """Sparse autoencoders"""

    kind: Annotated[
        Sequence[str], Setting((), "one or several of topk, batchtopk, relu, top-afa and mp; topk if not given")
    ]
    n_atoms: Annotated[int, Setting(16_384, "latents", least=1)]
    k: Annotated[
        int | None,
        STEPS.but(default=None, help="latents of a token: topk, mp; in the mean: batchtopk, and relu without l1"),
    ]
    afa: Annotated[
        float | None,
        Setting(None, "top-afa: the weight of the length of codes in the loss; 1/16 if not given", least=0),
    ]
    l1: Annotated[float | None, Setting(None, "relu: the weight of the sum of codes in the loss", least=0)]
    from_itda: Annotated[Any, Setting(None, "begin with the atoms of this dictionary", flag=str)]
    normalize: Annotated[
        Literal["none", "layer_norm"],
        Setting("none", "layer_norm makes mean 0 and deviation 1 over the coordinates of each activation"),
    ]
    lr: Annotated[
        float | None, Setting(None, "learning rate; 4e-3 for 2,048 latents, and less for more, if not given", least=0)
    ]
    batch: Annotated[int, Setting(2048, "tokens of a step", least=1)]
    buffer: Annotated[int, Setting(131_072, "tokens that are held and shuffled together", least=1)]
    dead_after: Annotated[
        int | None, Setting(None, "tokens after which a latent counts as dead; a tenth of all, at most 1e7", least=1)
    ]


# -- a dictionary that is there ---------------------------------------------------------------------------------------


class Again(TypedDict, total=False):
    """Other than in training"""

    model: Annotated[Any, Setting(None, "the model, where it is not where the dictionary says: id or folder", flag=str)]
    tokenizer: Annotated[Any, Setting(None, "the tokenizer, where it is not the model's: id or folder", flag=str)]
    k: Annotated[int | None, STEPS.but(default=None, help="pursuit steps for each token, if not the dictionary's")]
    method: Annotated[
        Literal["mp", "omp", "gp"] | None,
        Setting(None, "matching, orthogonal matching or gradient pursuit, if not the dictionary's"),
    ]
    nonneg: Annotated[bool | None, SIGNS.but(default=None, off="let coefficients be negative")]
    dtype: Annotated[Any, DTYPE.but(default=None)]
    device: Annotated[Any, Setting(None, "cpu, cuda, ...; the fastest there is if not given", flag=str)]
    trust_remote_code: Annotated[bool, Setting(False, "run code that the model's repository brings")]
    force: Annotated[bool, Setting(False, "use a model or tokenizer that is not the dictionary's")]


class Measuring(TypedDict, total=False):
    """Measuring"""

    tokens: Annotated[int, Setting(50_000, "measure on so many tokens at most", least=1)]
    ce_tokens: Annotated[
        int | None, Setting(10_000, "tokens to splice reconstructions into the running model on; 0 for none", least=0)
    ]
    controls: Annotated[
        bool | Sequence[str],
        Setting(True, "measure random tokens, random directions and an untrained model", flag=bool),
    ]
    tol: Annotated[
        float | None,
        Setting(None, "measure codes with as many atoms as each token needs too, to leave so much relative error"),
    ]
    systems: Annotated[Sequence[Any], Setting((), "further systems for the same table", flag=None)]
    probe: Annotated[Any, Setting(None, "a .jsonl or .parquet file of labelled texts, to probe latents with", flag=str)]
    probe_column: Annotated[str, Setting("text", "the column of the probe's texts")]
    probe_label: Annotated[str, Setting("label", "the column of the probe's labels")]
    in_sample: Annotated[bool, Setting(False, "measure on text that the dictionary was built on all the same")]


# -- several models ---------------------------------------------------------------------------------------------------


class Several(TypedDict, total=False):
    """Comparing"""

    align: Annotated[
        bool | None,
        Setting(None, "compare tokens by where they end in the text also where rows are alike", flag=bool),
    ]
    names: Annotated[Sequence[str] | None, Setting(None, "what to call the models")]


DRAW = Setting(0, "seed of all that is drawn", least=0)


class Drawing(TypedDict, total=False):
    """Running"""

    seed: Annotated[int, DRAW]


class Likeness(TypedDict, total=False):
    """Comparing"""

    measures: Annotated[
        Sequence[str] | None,
        Setting(
            None,
            "these measures (docs/similarity.md lists them) or all; four fast ones if not given",
            alias="--measure",
        ),
    ]
    atoms: Annotated[
        int | None,
        Setting(None, "atoms that the models share; 1,500, or half of the tokens where these are few", least=1),
    ]
    controls: Annotated[
        bool, Setting(True, "measure untrained models and shuffled tokens, which cost most of the time")
    ]
    draw: Annotated[int, DRAW]


class Null(TypedDict, total=False):
    """Fine-tune"""

    null: Annotated[
        Any, Setting(None, "another fine-tune of the base, on neutral text: what any tuning changes", flag=str)
    ]


class Changes(TypedDict, total=False):
    """Fine-tune"""

    n_anchors: Annotated[
        int | None,
        Setting(None, "tokens that stand for directions; 4,096, or half of the tokens if not given", least=2),
    ]
    n_atoms: Annotated[
        int,
        Setting(512, "atoms of the base's dictionaries, to a tenth; the tuned model's have their threshold", least=1),
    ]
    top: Annotated[int, Setting(100, "changed tokens to report; the terminal shows the first twelve", least=0)]
    rows: Annotated[int, Setting(40, "prompts to show on the page", least=0)]


# -- how the work runs ------------------------------------------------------------------------------------------------


class Workers(TypedDict, total=False):
    """Running"""

    workers: Annotated[int | None, Setting(None, "work with so many processes, to the same result", least=1)]
    ray: Annotated[
        bool | str,
        Setting(False, "work on the machines of the Ray cluster at this address; without one, on this machine"),
    ]


class Target(TypedDict, total=False):
    """Running"""

    overwrite: Annotated[bool, Setting(False, "replace what an earlier call with other settings has made there")]


class Keeping(TypedDict, total=False):
    """Running"""

    checkpoint_seconds: Annotated[float, Setting(30.0, "keep progress every so many seconds", least=0)]


class Progressing(TypedDict, total=False):
    """Running"""

    progress: Annotated[
        bool | Callable[..., Any], Setting(False, "True for a bar on the terminal, or a function to call", flag=None)
    ]


class Stopping(TypedDict, total=False):
    """Running"""

    stop: Annotated[
        Callable[[], bool],
        Setting(bool, "asked after every batch; True ends the work, which can go on later", flag=None),
    ]


groups(
    *(Places, Amount, Rows, Order, Source, Batches, Special, Padding),
    *(Tokenizer, Device, Revision, Backend, Large, Transformers),
    *(
        Steps,
        Signs,
        Size,
        Growth,
        Preset,
        Improvement,
        Autoencoder,
        Again,
        Measuring,
        Several,
        Drawing,
        Likeness,
        Null,
        Changes,
    ),
    *(Workers, Target, Keeping, Progressing, Stopping),
)
