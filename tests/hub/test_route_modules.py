"""Which rows of a batch the inputs of single modules are, of models that call them in odd ways."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_route import Folder, check_rows, folder, lora, run, tiny, tokens
from torch import Tensor, nn

from adapterkit.hub import attach
from adapterkit.registry.errors import InvalidError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
__all__ = ["folder"]  # a fixture


def test_a_pooler_sees_one_token_of_each_row(folder: Folder) -> None:
    model = tiny("bert")
    targets = ["query", "pooler.dense"]
    sources = {"a": folder("bert", lora(4, targets)), "b": folder("bert", lora(2, targets))}
    with attach(model, sources) as adapters:
        check_rows(model, adapters, ["b", None, "a", "a", "b"], tokens(5, 8))


def test_patches_of_images_are_routed(folder: Folder) -> None:
    """Convolutions and what they give: images are rows of the batch as tokens are."""
    model = tiny("vit")
    targets = ["projection", "query", "q_proj", "patch_embeddings.projection"]
    sources = {name: folder("vit", lora(rank, targets)) for name, rank in (("a", 4), ("b", 2))}
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with attach(model, sources) as adapters:
        check_rows(model, adapters, ["b", None, "a", "b"], {"pixel_values": images})
        with adapters.routed(["b", None, "a", "b"]), torch.inference_mode():
            by_name = model.vit(pixel_values=images).last_hidden_state
            assert torch.equal(by_name, model.vit(images).last_hidden_state)


def test_experts_meet_the_adapters_of_the_rows_of_their_tokens(folder: Folder) -> None:
    """Tokens come as (B * T, h), with tables of the experts chosen for each."""
    model = tiny("gpt_oss")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"]
    made = {
        "one": lora(2, [], target_parameters=parameters[:2]),
        "two": lora(2, ["q_proj"], target_parameters=parameters),
    }
    sources = {name: folder("gpt_oss", config) for name, config in made.items()}
    with attach(model, sources) as adapters:
        check_rows(model, adapters, ["two", None, "one", "two"], tokens(4, 4))
        check_rows(model, adapters, ["two", "one", {"one": 0.5}], tokens(3, 1))


@pytest.mark.parametrize("shape", [(2, 4), (4, 1), (1, 3), (4, 4)])
def test_experts_that_get_some_tokens_are_refused_by_name(
    shape: tuple[int, int], folder: Folder
) -> None:
    """However many they get: as many as the batch has rows is by chance."""
    model = tiny("switch")
    sources = {"a": folder("switch", lora(2, ["wi", "wo"]))}
    rows, length = shape
    inputs = tokens(rows, length)
    said = pytest.raises(InvalidError, match=r"encoder.*experts\.expert_\d\.w")
    with attach(model, sources) as adapters, adapters.routed(["a"] * rows), said:
        run(model, {**inputs, "decoder_input_ids": inputs["input_ids"]})


class Flat:
    """A forward that gives its module all tokens of all rows in one list, or a part of them."""

    def __init__(self, module: nn.Module, tokens: slice) -> None:
        self.forward, self.tokens = module.forward, tokens

    def __call__(self, x: Tensor) -> Tensor:
        y = self.forward(x.flatten(0, 1)[self.tokens])
        return y.unflatten(0, (len(x), -1)) if self.tokens == slice(None) else y


def test_tokens_in_one_list_belong_to_their_rows(folder: Folder) -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.forward = Flat(layer.mlp, slice(None))
    targets = ["down_proj", "gate_proj"]
    made = [lora(4, targets), lora(3, targets, use_dora=True), lora(4, targets)]
    sources = {name: folder("llama", config) for name, config in zip("abc", made, strict=True)}
    with attach(model, sources) as adapters:
        check_rows(model, adapters, ["a", None, "b", "a"], tokens(4, padding="left"))
        check_rows(model, adapters, ["a", "c", "a", "c"], tokens(4))


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_module_whose_rows_cannot_be_told_is_named(folder: Folder, use_dora: bool) -> None:
    model = tiny("llama")
    config = lora(4, ["down_proj"], use_dora=use_dora)
    with attach(model, {"a": folder("llama", config)}) as adapters:
        mlp = model.model.layers[1].mlp
        mlp.forward = Flat(mlp, slice(5))
        said = r"model\.layers\.1\.mlp\.down_proj got 5 rows of a batch of 2 by 6"
        with adapters.routed(["a", None]), pytest.raises(InvalidError, match=said):
            run(model, tokens(2))
        said = "outside of the model"
        with adapters.routed(["a", None]), pytest.raises(InvalidError, match=said):
            model.model.layers[0].mlp(torch.ones(2, 6, 32))


def test_another_number_of_rows_is_refused(folder: Folder) -> None:
    model = tiny("llama")
    with attach(model, {"a": folder("llama", lora())}) as adapters:
        with adapters.routed(["a", None, "a"]):
            for rows in (2, 4):
                said = f"3 rows are routed, but the batch has {rows}"
                with pytest.raises(InvalidError, match=said):
                    run(model, tokens(rows))
            run(model, tokens(3))
        for wrong in ([], "a", {"a": 1}):
            with pytest.raises(InvalidError, match="one entry for each row"):
                adapters.routed(wrong).__enter__()


def test_inputs_may_be_given_by_position_or_by_name(folder: Folder) -> None:
    model = tiny("llama")
    ids = tokens(3)["input_ids"]
    embedded = model.get_input_embeddings()(ids).detach()
    source = folder("llama", lora())
    with attach(model, {"a": source}) as adapters, adapters.routed(["a", None, "a"]):
        by_name = run(model, {"input_ids": ids})
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, by_name)
            assert torch.equal(model(inputs_embeds=embedded).logits, by_name)
            assert torch.equal(model(ids, torch.ones_like(ids)).logits, by_name)
            hidden = model.model(ids).last_hidden_state
            assert torch.equal(model.lm_head(hidden), by_name)


def test_what_was_made_ready_without_gradients_serves_with_them(folder: Folder) -> None:
    """Tensors of inference mode cannot be saved for a backward pass."""
    model = tiny("llama")
    made = {
        "low": lora(4, ["q_proj", "embed_tokens"]),
        "dora": lora(2, use_dora=True),
        "ia3": peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
        "head": lora(2, modules_to_save=["lm_head", "norm"], trainable_token_indices=[3, 5]),
        "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    }
    inputs = tokens(len(made) + 1)
    sources = {name: folder("llama", config) for name, config in made.items()}
    with attach(model, sources) as adapters:
        for rows in [[*made, None], ["low", None] * 3]:
            with adapters.routed(rows):
                expected = run(model, inputs)
                found = model(**inputs).logits
            torch.testing.assert_close(found.detach(), expected)
            found.sum().backward()
        for name in made:
            adapters.activate([name])
            expected = run(model, inputs)
            found = model(**inputs).logits
            torch.testing.assert_close(found.detach(), expected)
            found.sum().backward()


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_a_module_in_half_precision_gives_a_row_what_it_gives_alone(
    kind: str, folder: Folder
) -> None:
    """To 2 units in the last place of the largest."""
    config = lora(8, ["q_proj"], use_dora=kind == "dora")
    if kind == "ia3":
        config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    model = tiny("llama").bfloat16()
    seen: list[Tensor] = []
    with attach(model, {name: folder("llama", config) for name in "ab"}) as adapters:
        module = model.model.layers[0].self_attn.q_proj
        module.register_forward_hook(lambda *call: seen.append(call[2]))
        inputs = tokens(4, 8)
        with adapters.routed(["b", None, "a", "b"]):
            run(model, inputs)
        for number, row in enumerate(["b", None, "a", "b"]):
            adapters.activate([row] if row else [])
            run(model, {name: value[number : number + 1] for name, value in inputs.items()})
            expected = seen.pop()[0]
            ulp = 2**-8 * float(expected.abs().max())
            torch.testing.assert_close(seen[0][number], expected, atol=2 * ulp, rtol=0)


QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_rows_on_a_quantized_base_stay_as_near_as_its_own(
    quantization: str, folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """bitsandbytes scales 8-bit inputs by what else is in the batch: what the bare base does to a
    row is the measure."""
    path = tmp_path_factory.mktemp("base")
    tiny("llama").save_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(**QUANTIZED[quantization]),
        device_map={"": "cpu"},
    ).eval()
    kinds = {"a": lora(4, "all-linear"), "dora": lora(2, use_dora=True), "b": lora(8)}
    kinds["ia3"] = peft.IA3Config(
        target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    kinds["oft"] = peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8)
    rows = ["b", None, "ia3", {"a": 0.5, "b": -0.3}, "dora", "oft", "a"]
    inputs = tokens(len(rows))
    single = [{k: v[n : n + 1] for k, v in inputs.items()} for n in range(len(rows))]
    base = run(model, inputs)
    own = [float((base[n] - run(model, one)[0]).abs().max()) for n, one in enumerate(single)]
    sources = {name: folder("llama", config) for name, config in kinds.items()}
    with attach(model, sources) as adapters:
        with adapters.routed(rows):
            found = run(model, inputs)
        for number, row in enumerate(rows):
            adapters.activate([] if row is None else [row] if isinstance(row, str) else row)
            gap = float((found[number] - run(model, single[number])[0]).abs().max())
            assert gap <= 2 * max(own) + 1e-3, (row, gap, own)
