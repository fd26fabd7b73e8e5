"""How each tool is asked: it steers with a file of ours, or writes one that we read."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import equiv
from benchmarks import llama_cpp
from benchmarks.peer_world import Row, World
from equiv.demo import loading
from equiv.steering.formats import easysteer, gguf, lm_eval, pyreft, steerling
from equiv.steering.forms.form import Steering


def run_repeng(world: World) -> Iterator[Row]:
    """Control vectors in GGUF."""
    repeng = import_module("repeng")

    steering = {(layer, "block_out"): world.vector() for layer in (1, 3)}
    path = world.folder / "ours.gguf"
    gguf.write(steering, path, family="llama")
    control = repeng.ControlVector.import_gguf(path)
    wrapped = repeng.ControlModel(world.model, [1, 3])
    wrapped.set_control(control, 1.0)
    with torch.no_grad():
        theirs = wrapped(world.ids).logits
    wrapped.unwrap()
    yield world.row("GGUF written by equiv", theirs, world.steered(steering))
    control.export_gguf(world.folder / "theirs.gguf")
    read = gguf.read(world.folder / "theirs.gguf")
    yield world.row("GGUF written by repeng", theirs, world.steered(read))


def run_dialz(world: World) -> Iterator[Row]:
    """Control vectors in GGUF, under another name."""
    dialz = import_module("dialz")

    steering = {(layer, "block_out"): world.vector() for layer in (1, 3)}
    path = world.folder / "ours.gguf"
    gguf.write(steering, path, family="llama", tool="dialz")
    control = dialz.SteeringVector.import_gguf(path)
    wrapped = dialz.SteeringModel(str(loading.BASE), [1, 3])
    wrapped.float()  # it loads float16, whatever there is
    wrapped.set_control(control, 1.0)
    with torch.no_grad():
        theirs = wrapped(world.ids).logits
    yield world.row("GGUF written by equiv", theirs, world.steered(steering))
    control.export_gguf(world.folder / "theirs.gguf")
    read = gguf.read(world.folder / "theirs.gguf")
    yield world.row("GGUF written by Dialz", theirs, world.steered(read))


def run_pyreft(world: World) -> Iterator[Row]:
    """Folders, and every intervention of its own."""
    theirs = import_module("pyreft")
    interventions = import_module("pyreft.interventions")

    steering: dict[tuple[int, str], Steering] = {
        (0, "mlp_in"): world.vector(),
        (1, "block_out"): world.loreft(),
        (2, "mlp_out"): world.vector(),
        (3, "attn_out"): world.affine(),
    }
    path = world.folder / "reft"
    pyreft.write(steering, path, family="llama")
    loaded = theirs.ReftModel.load(str(path), world.model)
    for intervention in loaded.interventions.values():
        intervention.float()
    logits = _reft_logits(world, loaded)
    read = pyreft.read(path, family="llama")
    rounded = {
        key: equiv.LoReFT(s.rotation, _half(s.weight), _half(s.bias))
        if isinstance(s, equiv.LoReFT)
        else s
        for key, s in read.items()
    }
    what = "folder written by equiv: LoReFT, affine map, vectors at four sites"
    yield world.row(
        f"{what}; W, b rounded as pyreft does", logits, world.steered(rounded)
    )
    yield world.row(
        f"{what}; W, b as written", logits, world.steered(read), exact=False
    )
    for name, phi, options in (
        ("Loreft", "identity", {}),
        ("Consreft", "identity", {}),
        ("Lobireft", "identity", {}),
        ("Direft", "silu", {}),
        ("Noreft", "identity", {"add_bias": True}),
        ("Nodireft", "silu", {"add_bias": True}),
    ):
        kind = getattr(interventions, f"{name}Intervention")
        made = _trained(world, kind, phi, options)
        made.save(str(world.folder / name))
        read = pyreft.read(world.folder / name, activation=phi)
        what = f"{name} trained and written by pyreft, φ = {phi}"
        yield world.row(what, _reft_logits(world, made), world.steered(read))


def _trained(world: World, kind: Any, phi: str, options: dict[str, Any]) -> Any:
    """A pyreft model after five steps, so that no rotation is where it began."""
    theirs = import_module("pyreft")

    torch.manual_seed(0)
    act = None if phi == "identity" else phi
    rows = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": 4,
            "intervention": kind(
                embed_dim=world.width,
                low_rank_dimension=4,
                dtype=torch.float32,
                act_fn=act,
                **options,
            ),
        }
        for layer in (1, 2)
    ]
    made = theirs.get_reft_model(world.model, theirs.ReftConfig(representations=rows))
    parameters = [p for i in made.interventions.values() for p in i.parameters()]
    optimiser = torch.optim.Adam([p.requires_grad_() for p in parameters], lr=0.05)
    for _ in range(5):
        optimiser.zero_grad()
        made({"input_ids": world.ids})[1].logits.square().mean().backward()
        optimiser.step()
    return made


@torch.no_grad()
def _reft_logits(world: World, made: Any) -> Tensor:
    made.eval()
    everywhere = [[list(range(world.ids.shape[1]))]] * len(made.interventions)
    places = {"sources->base": (None, everywhere)}
    return made({"input_ids": world.ids}, unit_locations=places)[1].logits


def _half(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


def run_lm_eval(world: World) -> Iterator[Row]:
    """Its model type `steered`."""
    model_of = import_module("lm_eval.models.hf_steered").SteeredModel

    def steered(path: Path) -> Tensor:
        return model_of(
            pretrained=str(loading.BASE),
            steer_path=str(path),
            device="cpu",
            dtype="float32",
        )._model_call(world.ids)

    sites = ((1, "block_out"), (2, "mlp_out"), (3, "attn_out"))
    steering = {key: world.vector() for key in sites}
    path = world.folder / "ours.pt"
    lm_eval.write(steering, path, family="llama")
    what = ".pt written by equiv: vectors at three sites"
    yield world.row(what, steered(path), world.steered(steering))
    clamp = {
        "steering_vector": world.drawn(world.width),
        "steering_coefficient": 9.0,
        "action": "clamp",
        "bias": world.drawn(world.width),
    }
    torch.save({"layers.2": clamp}, world.folder / "clamp.pt")
    read = lm_eval.read(world.folder / "clamp.pt")
    what = ".pt written by hand: clamp with a bias"
    yield world.row(what, steered(world.folder / "clamp.pt"), world.steered(read))


@torch.no_grad()
def run_steerling(world: World) -> Iterator[Row]:
    """Its adapters and fixed vectors."""
    steerer = import_module("steerer")

    layers, targets = [1, 2], ("block", "attn", "mlp")
    sites = ("block_out", "mlp_in", "mlp_out")
    steering = {(n, site): world.adapter() for n in layers for site in sites}
    path = world.folder / "pytorch_model.bin"
    steerling.write(steering, path, family="llama")
    made = steerer.AdapterSteerer(world.model, layers, targets, 4, "all")
    made.load_state_dict(torch.load(path, weights_only=True), strict=False)
    theirs = _unhooked(world, made)
    what = "adapters written by equiv: SiLU at three sites"
    yield world.row(what, theirs, world.steered(steering))
    torch.save(made.state_dict(), path)
    read = steerling.read(path, family="llama")
    yield world.row("checkpoint of its adapters", theirs, world.steered(read))
    fixed = steerer.FixedVectorSteerer(world.model, layers, targets, "last")
    for delta in fixed.deltas.values():
        delta.normal_(generator=world.generator)
    theirs = _unhooked(world, fixed)
    torch.save(fixed.state_dict(), path)
    read = steerling.read(path, family="llama", positions="last + generated")
    what = "checkpoint of its fixed vectors, on the last token"
    yield world.row(what, theirs, world.steered(read))


def _unhooked(world: World, made: Any) -> Tensor:
    """Its logits; its hooks stay on the model unless they are taken off."""
    try:
        return made(world.ids).logits
    finally:
        for handle in made._hooks:
            handle.remove()


@torch.no_grad()
def run_easysteer(world: World) -> Iterator[Row]:
    """Its engine needs a GPU; its reader of payloads does not."""
    payloads = import_module("vllm.steer_vectors.payloads")

    chosen = world.loreft()
    steering = {(0, "block_out"): world.vector(), (2, "block_out"): chosen}
    path = world.folder / "ours.json"
    easysteer.write(steering, path)
    one, two = (
        payloads.materialize(wire, "cpu", torch.float32, None)
        for wire in json.loads(path.read_text())
    )
    parts = two[2]
    rotation = parts["rotate_layer"]

    def reft(h: Tensor) -> Tensor:  # as its algorithm `loreft` has it
        put = h @ parts["learned_source_weight"].T + parts["learned_source_bias"]
        return h + (put - h @ rotation) @ rotation.T

    edits = {0: lambda h: h + one[0], 2: reft}
    handles = [
        world.model.model.layers[layer].register_forward_hook(
            lambda _m, _a, out, edit=edit: edit(out)
        )
        for layer, edit in edits.items()
    ]
    theirs = world.model(world.ids).logits
    for handle in handles:
        handle.remove()
    what = (
        "payloads written by equiv, read by its module alone, applied by its formulas"
    )
    yield world.row(what, theirs, world.steered(steering))


def run_llama_cpp(world: World) -> Iterator[Row]:
    """Its server, with and without a control vector."""
    steering = {(n, "block_out"): world.vector() for n in (1, 3)}
    vector, model = world.folder / "vector.gguf", world.folder / "model.gguf"
    gguf.write(steering, vector, family="llama")
    llama_cpp.write_model(world.model, model)
    ids = world.ids[0].tolist()
    unsteered = world.unsteered[0, -1].log_softmax(0)
    plain = llama_cpp.log_probabilities(model, None, ids)
    off = float((plain - unsteered).abs().max())
    assert off <= llama_cpp.ALLOWED, "llama.cpp does not compute this model"
    theirs = llama_cpp.log_probabilities(model, vector, ids)
    ours = world.steered(steering)[0, -1].log_softmax(0)
    yield Row(
        "GGUF written by equiv: log-probabilities of the next token",
        float((theirs - ours).abs().max()),
        llama_cpp.ALLOWED,
        float((theirs - unsteered).abs().max()),
    )
    # One vector of the file at layer 0, and the other is gone with it: no error.
    llama_cpp.rename(vector, b"direction.1", b"direction.0")
    thrown_away = llama_cpp.log_probabilities(model, vector, ids)
    assert torch.equal(thrown_away, plain), "llama.cpp takes a file with direction.0"
