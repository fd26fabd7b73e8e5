"""Every kind of adapter of PEFT: base + update is the adapted model, or is refused."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import witness

import equiv
from equiv.testing.models import transformer
from equiv.update.low_rank import LowRank
from equiv.update.peft_names import clean, is_own
from equiv.update.sources import resolve

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IDS = torch.arange(32).reshape(
    4, 8
)  # every token, so that no row of an embedding hides
F64 = torch.float64

QV = {"target_modules": ["q_proj", "v_proj"]}
QO = {"target_modules": ["q_proj", "o_proj"]}  # for kinds of square weights only
LORA = {"r": 3, "lora_alpha": 5}

# Kind → configuration and family; Qwen2's attention has biases, Llama's has none.
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "LORA": ("LoraConfig", {**LORA, "target_modules": "all-linear"}, "llama"),
    "rslora": ("LoraConfig", {**LORA, **QV, "use_rslora": True}, "llama"),
    "dora": ("LoraConfig", {**LORA, **QV, "use_dora": True}, "llama"),
    "lora bias": ("LoraConfig", {**LORA, **QV, "lora_bias": True}, "qwen2"),
    "base's biases": ("LoraConfig", {**LORA, **QV, "bias": "all"}, "qwen2"),
    "patterns": (
        "LoraConfig",
        {
            **LORA,
            **QV,
            "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 1},
            "alpha_pattern": {"q_proj": 9, r"^model\.layers\.0\..*v_proj": 2},
        },
        "llama",
    ),
    "embeddings": ("LoraConfig", {**LORA, "target_modules": ["embed_tokens"]}, "llama"),
    "a head of its own": (
        "LoraConfig",
        {**LORA, **QV, "modules_to_save": ["lm_head", "model.norm"]},
        "llama",
    ),
    "some tokens": (
        "LoraConfig",
        {**LORA, **QV, "trainable_token_indices": [4, 5, 9]},
        "llama",
    ),
    "dora and some tokens": (
        "LoraConfig",
        {**LORA, **QV, "use_dora": True, "trainable_token_indices": [4]},
        "llama",
    ),
    "pissa": ("LoraConfig", {**LORA, **QV, "init_lora_weights": "pissa"}, "llama"),
    "olora": ("LoraConfig", {**LORA, **QV, "init_lora_weights": "olora"}, "llama"),
    "ADALORA": (
        "AdaLoraConfig",
        {"init_r": 4, "target_r": 2, "total_step": 10, **QV},
        "llama",
    ),
    "ADAMSS": (
        "AdamssConfig",
        {"r": 4, "num_subspaces": 2, "subspace_rank": 1, **QO},
        "llama",
    ),
    "BEFT": ("BeftConfig", QV, "qwen2"),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4, **QV}, "llama"),
    "C3A": ("C3AConfig", {"block_size": 8, **QV}, "llama"),
    "DEFT": ("DeftConfig", {"r": 2, **QV}, "llama"),
    "DELORA": ("DeloraConfig", {"r": 3, **QV}, "llama"),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 20, **QV}, "llama"),
    "FROD": ("FrodConfig", QO, "llama"),
    "GLORA": ("GloraConfig", {"r": 2, **QV}, "qwen2"),
    "GRALORA": ("GraloraConfig", {"r": 4, "gralora_k": 2, **QV}, "llama"),
    "HIRA": ("HiraConfig", {"r": 3, **QV}, "llama"),
    "HRA": ("HRAConfig", {"r": 2, **QV}, "llama"),
    "IA3": (
        "IA3Config",
        {
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        "qwen2",
    ),
    "LN_TUNING": (
        "LNTuningConfig",
        {"target_modules": ["input_layernorm", "norm"]},
        "llama",
    ),
    "LOHA": ("LoHaConfig", {"r": 3, **QV}, "llama"),
    "LOKR": ("LoKrConfig", {"r": 3, **QV}, "llama"),
    "MISS": ("MissConfig", {"r": 4, **QV}, "llama"),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 4, **QV}, "llama"),
    "OSF": ("OSFConfig", {"effective_rank": 4, **QV}, "llama"),
    "PEANUT": ("PeanutConfig", {"r": 2, **QV}, "llama"),
    "PSOFT": ("PsoftConfig", {"r": 4, **QV}, "llama"),
    "PVERA": ("PveraConfig", {"r": 4, **QV}, "llama"),
    "RANDLORA": ("RandLoraConfig", {"r": 4, **QV}, "llama"),
    "ROAD": ("RoadConfig", {"group_size": 8, "target_modules": ["q_proj"]}, "qwen2"),
    "SHIRA": ("ShiraConfig", {"r": 2, **QV}, "llama"),
    "SUPERTUNING": ("SupertuningConfig", QV, "llama"),
    "TINYLORA": ("TinyLoraConfig", {"r": 2, **QV}, "llama"),
    "TRAINABLE_TOKENS": (
        "TrainableTokensConfig",
        {"token_indices": [4, 5], "target_modules": ["embed_tokens"]},
        "llama",
    ),
    "UNILORA": ("UniLoraConfig", {"r": 2, **QV}, "llama"),
    "VBLORA": (
        "VBLoRAConfig",
        {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2, **QV},
        "llama",
    ),
    "VERA": ("VeraConfig", {"r": 4, **QV}, "llama"),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 20, **QV}, "llama"),
}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
# Kinds that are no update of weights.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "aLoRA": (
        "LoraConfig",
        {**LORA, **QV, "alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"},
    ),
    "ADAPTION_PROMPT": (
        "AdaptionPromptConfig",
        {"task_type": "CAUSAL_LM", "adapter_len": 2, "adapter_layers": 1},
    ),
    "CARTRIDGE": ("CartridgeConfig", PROMPT),
    "CPT": (
        "CPTConfig",
        {
            "task_type": "CAUSAL_LM",
            "cpt_token_ids": [3, 4],
            "cpt_mask": [1, 1],
            "cpt_tokens_type_mask": [1, 2],
        },
    ),
    "LILY": ("LilyConfig", {"r": 2, **QV}),
    "MULTITASK_PROMPT_TUNING": ("MultitaskPromptTuningConfig", PROMPT),
    "POLY": ("PolyConfig", {"r": 2, **QV}),
    "PREFIX_TUNING": ("PrefixTuningConfig", PROMPT),
    "PROMPT_TUNING": ("PromptTuningConfig", PROMPT),
    "P_TUNING": ("PromptEncoderConfig", PROMPT),
    "SHADOW": ("ShadowConfig", {}),
}


def base_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return transformer(family, seed=1, dtype=dtype)


def adapted(base: Any, config: str, settings: dict[str, Any]) -> Any:
    """The base wrapped, in float64, with an adapter that does something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, getattr(peft, config)(**settings)).double()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


# Kinds that PEFT computes in float32 in whatever dtype the model is.
IN_FLOAT32 = {"C3A", "DEFT", "FOURIERFT"}
# Kinds that PEFT can set up on a float32 base only.
ON_FLOAT32 = {"pissa", "olora", "PSOFT"}


def arithmetic(kind: str) -> Any:
    """Float64 throughout, where the kind's own code bears it."""
    return nullcontext() if kind in IN_FLOAT32 else witness.own_arithmetic()


def check_same(
    base: Any, update: equiv.Update, model: Any, kind: str, rtol: float
) -> None:
    """Base + update answers as the adapted model does."""
    moved = witness.moved(base, update, 1.0)
    with arithmetic(kind), torch.no_grad():
        expected, before = model(input_ids=IDS).logits, base(input_ids=IDS).logits
        found = torch.func.functional_call(base, moved, (IDS,)).logits
    assert float((expected - before).norm() / before.norm()) > 0.01
    assert float((found - expected).norm() / expected.norm()) < rtol


# Sums over at most 24 products, a dozen in a row: float64 leaves some 1e-15 of the
# logits. In float32 it is some 1e-7, and the derivative may be larger than 1.
FLOAT64, FLOAT32 = 1e-13, 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_base_and_update_are_the_adapted_model(kind: str, tmp_path: Path) -> None:
    config, settings, family = KINDS[kind]
    model = adapted(base_model(family), config, settings)
    base = base_model(family, F64)
    before = copy.deepcopy(model.state_dict())
    rtol = FLOAT32 if kind in IN_FLOAT32 else FLOAT64
    check_same(base, resolve(base, model), model, kind, rtol)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    model.save_pretrained(tmp_path)
    if kind in ON_FLOAT32:
        base, rtol = base_model(family), FLOAT32
    names = [name for name, _ in base.named_modules()]
    state = torch.random.get_rng_state()
    stored = resolve(base, str(tmp_path))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert names == [name for name, _ in base.named_modules()]
    check_same(base.double(), stored, model, kind, rtol)


GPT2 = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
SQUARE = {**GPT2, "target_modules": ["attn.c_proj"]}
# Conv1D holds [in, out]: what PEFT adds has to be turned round.
TRANSPOSED: dict[str, tuple[str, dict[str, Any]]] = {
    "LORA": ("LoraConfig", {**LORA, **GPT2}),
    "square": ("LoraConfig", {**LORA, **SQUARE}),
    "dora": ("LoraConfig", {**LORA, **SQUARE, "use_dora": True}),
    "lora bias": ("LoraConfig", {**LORA, **GPT2, "lora_bias": True}),
    "ADALORA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 9, **GPT2}),
    "DEFT": ("DeftConfig", {"r": 2, **SQUARE}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 20, **SQUARE}),
    "HIRA": ("HiraConfig", {"r": 3, **SQUARE}),
    "IA3": ("IA3Config", {**GPT2, "feedforward_modules": ["c_fc"]}),
    "PVERA": ("PveraConfig", {"r": 4, **SQUARE}),
    "RANDLORA": ("RandLoraConfig", {"r": 4, **SQUARE}),
    "VBLORA": (
        "VBLoRAConfig",
        {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2, **SQUARE},
    ),
    "VERA": ("VeraConfig", {"r": 4, **SQUARE}),
}


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_layers_that_hold_their_weight_transposed(kind: str, tmp_path: Path) -> None:
    config, settings = TRANSPOSED[kind]
    model = adapted(base_model("gpt2"), config, settings)
    model.save_pretrained(tmp_path)
    rtol = FLOAT32 if kind in IN_FLOAT32 else FLOAT64
    check_same(
        base_model("gpt2", F64),
        resolve(base_model("gpt2", F64), model),
        model,
        kind,
        rtol,
    )
    base = base_model("gpt2", F64)
    check_same(base, resolve(base, str(tmp_path)), model, kind, rtol)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_update_of_weights_is_refused_by_name(kind: str) -> None:
    config, settings = REFUSED[kind]
    model = peft.get_peft_model(base_model("llama"), getattr(peft, config)(**settings))
    name = "LoRA" if kind == "aLoRA" else kind
    with pytest.raises(equiv.UpdateError, match=f"kind {name} cannot be merged"):
        equiv.Update.from_peft(model)


def test_every_kind_that_peft_has_is_tried_here() -> None:
    known = {kind for kind in (*KINDS, *REFUSED) if kind.isupper()} | {"XLORA"}
    assert {kind.value for kind in peft.PeftType} == known


def test_names_of_every_kind_are_told_from_the_bases() -> None:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        if prefix.removesuffix("_").upper() not in REFUSED or "lily" in prefix:
            assert not is_own(f"layers.0.q_proj.{prefix}A.default"), prefix
    for kind, (config, settings, family) in KINDS.items():
        base = base_model(family)
        own = {name for name, _ in base.named_parameters()}
        inside = adapted(base, config, settings).get_base_model()
        found = {clean(n) for n, _ in inside.named_parameters() if is_own(n)}
        assert found == own, kind


def test_peft_s_get_delta_weight_is_wrong_for_dora_and_ours_is_right() -> None:
    """DoRA sets the norms of the rows as well; PEFT's method tells LoRA's part only."""
    model = adapted(base_model("llama"), *KINDS["dora"][:2])
    name = "model.layers.0.self_attn.q_proj.weight"
    base = base_model("llama", F64)
    ours = witness.dense(resolve(base, model))[name]
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    down, up = (w["default"].weight.detach() for w in (layer.lora_A, layer.lora_B))
    weight = layer.base_layer.weight.detach()
    moved = weight + 5 / 3 * up @ down
    magnitude = layer.lora_magnitude_vector["default"].weight.detach()
    expected = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    theirs = layer.get_delta_weight("default").detach()
    assert float((theirs - expected).norm() / expected.norm()) > 0.1


def test_experts_kept_as_one_parameter() -> None:
    """`target_parameters`: LoRA on three-dimensional weights, merged by PEFT."""
    from transformers import MixtralConfig, MixtralForCausalLM

    def made() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            sizes: dict[str, Any] = {
                "hidden_size": 16,
                "intermediate_size": 24,
                "vocab_size": 32,
            }
            heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
            config = MixtralConfig(
                num_hidden_layers=1, num_local_experts=4, **sizes, **heads
            )
            config._experts_implementation = "eager"  # the fused one has no float64
            return MixtralForCausalLM(config).double().eval()

    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = {**LORA, "target_modules": ["q_proj"], "target_parameters": experts}
    model = adapted(made(), "LoraConfig", settings)
    update = resolve(made(), model)
    low = [isinstance(delta, LowRank) for delta in update.deltas.values()]
    assert sorted(low) == [False, False, True]
    check_same(made(), update, model, "experts", FLOAT64)


def test_only_what_has_to_be_merged_is_dense() -> None:
    config, settings, family = KINDS["a head of its own"]
    update = resolve(base_model(family), adapted(base_model(family), config, settings))
    dense = [n for n, d in update.deltas.items() if not isinstance(d, LowRank)]
    assert sorted(dense) == ["lm_head.weight", "model.norm.weight"]
    assert len(update.deltas) == 6


def test_a_weight_that_two_modules_share_moves_once() -> None:
    """PEFT can train some tokens of a tied embedding, for both of its users."""
    for extra in (
        {"trainable_token_indices": [4, 5], **QV},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, **QV},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ):
        base = transformer("llama", seed=1, tie_word_embeddings=True)
        fresh = copy.deepcopy(base)
        model = adapted(base, "LoraConfig", {**LORA, **extra})
        update = resolve(fresh, model)
        assert "lm_head.weight" not in update.deltas
        check_same(fresh, update, model, "tied", FLOAT64)


def test_a_tied_embedding_trained_for_one_of_its_users_is_refused() -> None:
    base = transformer("llama", seed=1, tie_word_embeddings=True)
    extra = {**LORA, **QV, "modules_to_save": ["embed_tokens"]}
    model = adapted(base, "LoraConfig", extra)
    with pytest.raises(equiv.UpdateError, match=r"`model.embed_tokens`.*tied"):
        equiv.Update.from_peft(model)


def test_what_only_peft_can_merge_needs_the_base(tmp_path: Path) -> None:
    adapted(base_model("llama"), *KINDS["dora"][:2]).save_pretrained(tmp_path)
    with pytest.raises(equiv.UpdateError, match="needs the base"):
        equiv.Update.from_peft(tmp_path)
    found = equiv.Update.from_peft(tmp_path, base_model("llama"))
    assert found.source == f"DoRA adapter {tmp_path.name}"
    with pytest.raises(equiv.UpdateError, match="PEFT cannot load the LORA adapter"):
        equiv.Update.from_peft(tmp_path, transformer("llama", head_dim=4))


def test_without_peft_the_refusal_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(base_model("llama"), *KINDS["dora"][:2]).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(equiv.UpdateError, match=r"equiv\[peft\]"):
        equiv.Update.from_peft(tmp_path, base_model("llama"))


def test_pickles_are_never_read(tmp_path: Path) -> None:
    adapted(base_model("llama"), *KINDS["dora"][:2]).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(equiv.FileFormatError, match="Only safetensors are read"):
        equiv.Update.from_peft(tmp_path, base_model("llama"))


def test_experts_weighed_by_the_input_are_refused(tmp_path: Path) -> None:
    """PEFT would merge X-LoRA's experts as if each had weight 1."""
    adapted(base_model("llama"), *KINDS["LORA"][:2]).save_pretrained(tmp_path)
    settings = {"task_type": "CAUSAL_LM", "hidden_size": 16}
    config = peft.XLoraConfig(**settings, adapters={"0": str(tmp_path)})
    base = base_model("llama")
    base.config.use_cache = False
    with pytest.raises(equiv.UpdateError, match="kind XLORA cannot be merged"):
        equiv.Update.from_peft(peft.get_peft_model(base, config))


@pytest.mark.parametrize("kind", ["LORA", "dora", "a head of its own"])
def test_adapters_that_transformers_loaded(kind: str, tmp_path: Path) -> None:
    """`from_pretrained` of an adapter's folder gives the base's class, not PEFT's."""
    config, settings, family = KINDS[kind]
    base = base_model(family, F64)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base_model(family), config, settings)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = type(base).from_pretrained(tmp_path / "adapter").double().eval()
    update = resolve(base, loaded)
    check_same(base, update, loaded, kind, FLOAT64)
    same = equiv.Update.from_peft(loaded)
    assert same.deltas.keys() == update.deltas.keys()
    by_itself = equiv.shifts(loaded, loaded, IDS, dtype=F64)
    by_parts = equiv.shifts(base, update, IDS, dtype=F64)
    for a, b in zip(by_itself, by_parts, strict=True):
        witness.close(a.exact, b.exact)
        witness.close(a.first_order, b.first_order)


@pytest.mark.parametrize("kind", ["pissa", "olora", "base's biases"])
def test_a_base_that_peft_has_changed_is_no_base(kind: str) -> None:
    config, settings, family = KINDS[kind]
    base = base_model(family)
    model = adapted(base, config, settings)
    for call in (
        lambda: equiv.Update.from_peft(model),
        lambda: equiv.check(base, model, IDS),
    ):
        with pytest.raises(equiv.UpdateError, match="Pass a base loaded afresh"):
            call()
    assert equiv.Update.from_peft(model, base_model(family)).norm() > 0


def test_another_base_s_weights_are_part_of_the_update() -> None:
    """What the adapted model is, less the model it is compared with."""
    config, settings, family = KINDS["LORA"]
    model = adapted(base_model(family), config, settings)
    other = base_model(family, F64)
    other.lm_head.weight.data += 0.1
    update = resolve(other, model)
    check_same(other, update, model, "LORA", FLOAT64)
    assert update.source == "LoRA, 1 of the base's own weights differ"
    for dtype in (torch.float32, torch.bfloat16):  # rounding is no difference
        assert resolve(base_model(family, dtype), model).source == "LoRA"


def test_an_adapter_that_changes_nothing_is_refused() -> None:
    config, settings, family = KINDS["IA3"]  # starts from factors of exactly 1
    made = getattr(peft, config)(**settings)
    fresh = peft.get_peft_model(base_model(family, F64), made)
    with pytest.raises(equiv.UpdateError, match="change nothing"):
        equiv.Update.from_peft(fresh)
