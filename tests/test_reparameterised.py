"""Networks trained with branches, layer scales or adapters: folded as far as their authors fold them."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from random_chains import warmed
from timm.utils import reparameterize_model
from torch import Tensor, fx, nn

import graphsurgery as gs
from graphsurgery.cost import kind_of, op_name
from graphsurgery.export import export_onnx, node_counts
from graphsurgery.graph import capture_info, get_attr_value

REPARAMETERISED = ("repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_100")
# Networks with layer scales or norms before layers, and a small size that each takes.
SCALED = {"levit_128": 64, "cait_xxs24_224": 32, "vit_small_patch14_dinov2": 28, "convnext_tiny": 64}
HEAVY = ("Conv", "Gemm", "MatMul")
LEVELS = {
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def as_trained(model: nn.Module, x: Tensor) -> nn.Module:
    """Norms and layer scales as training leaves them, some negative; statistics of random inputs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2].startswith("gamma"):
                parameter.uniform_(0.2, 1).mul_(torch.where(torch.rand_like(parameter) < 0.3, -1, 1))
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            warmed(norm)
            norm.reset_running_stats()
            norm.momentum = None  # the plain average, so that a few passes give the statistics of the inputs
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(-2, 2)
                module.bias.normal_()
        model.train()
        for _ in range(3):
            model(torch.randn(8, *x.shape[1:]))
    return model.eval()


def network(name: str, size: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    sized = name.startswith(("levit", "cait", "vit_"))
    model = timm.create_model(name, num_classes=10, **({"img_size": size} if sized else {}))
    x = torch.randn(2, 3, size, size)
    return as_trained(model, x), x


def nodes_run(path: Path, level: str) -> tuple[int, int]:
    """Heavy nodes and all nodes of the graph that onnxruntime makes of a file."""
    saved = path.with_suffix(f".{level}.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # onnxruntime warns that such a file is for this machine only
    options.graph_optimization_level = LEVELS[level]
    options.optimized_model_filepath = str(saved)
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    types = [node.op_type for node in onnx.load(saved, load_external_data=False).graph.node]
    return sum(any(part in kind for part in HEAVY) for kind in types), len(types)


def layers(model: nn.Module) -> int:
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    return sum(isinstance(module, kinds) for module in model.modules())


def check_reparameterised(name: str, size: int, folder: Path) -> None:
    model, x = network(name, size)
    result = gs.optimize(model, (x,))
    assert result.report.verification is not None
    assert result.report.verification.ok
    exported = result.export_onnx(folder / "ours.onnx")
    assert exported.verdict is not None
    assert exported.verdict.ok

    info = capture_info(result.graph_module)
    reparameterised = reparameterize_model(model)
    assert layers(reparameterised) < layers(model), "there is nothing to fold"
    export_onnx(reparameterised, info, folder / "timm.onnx", verify=False)
    for level in LEVELS:
        theirs, ours = (nodes_run(folder / f"{which}.onnx", level) for which in ("timm", "ours"))
        assert ours[0] <= theirs[0], f"heavy nodes, onnxruntime's level {level}"
        assert ours[1] <= theirs[1], f"all nodes, onnxruntime's level {level}"
    assert not gs.optimize(result.module, (x,), verify="off").report.changes, "a second run found something"


@pytest.mark.slow
def test_leaves_no_more_than_the_authors_reparameterisation(tmp_path: Path) -> None:
    # At 32 the last map is one position: there a Linear takes 4 of the conv's 9 taps, and two views more.
    check_reparameterised("repvgg_a0", 64, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("name", REPARAMETERISED)
def test_leaves_no_more_than_the_authors_reparameterisation_at_larger_sizes(
    name: str, size: int, tmp_path: Path
) -> None:
    check_reparameterised(name, size, tmp_path)


# -- layer scales and norms ---------------------------------------------------------------------------------


def vector_scales(gm: fx.GraphModule) -> list[str]:
    """Products of a value with a constant, or what is computed of constants, that is no scalar."""
    constant: set[fx.Node] = set()
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and inputs and constant.issuperset(inputs)):
            constant.add(node)
    return [
        node.name
        for node in gm.graph.nodes
        if op_name(node) in ("mul", "div")
        and node not in constant
        and any(o in constant and o.meta["val"].numel() > 1 for o in node.all_input_nodes)
    ]


def leads_to_layers_only(node: fx.Node) -> bool:
    """Whether all that reads a value, behind views and slices, are Linear and convs without padding."""

    def reads(user: fx.Node, value: fx.Node) -> bool:
        if op_name(user) == "linear":
            return user.args[0] is value
        if op_name(user).startswith("conv"):
            padding = user.args[4] if len(user.args) > 4 else [0]
            return user.args[0] is value and set(padding) == {0}
        return kind_of(user) == "movement" and op_name(user) != "cat" and leads_to_layers_only(user)

    return bool(node.users) and all(reads(user, node) for user in node.users)


def norm_affines(gm: fx.GraphModule) -> list[str]:
    """Layer norms with a weight or a bias that the layers behind could take."""
    found = []
    for node in gm.graph.nodes:
        if op_name(node) == "layer_norm" and leads_to_layers_only(node):
            affine = (*node.args[2:4], None, None)[:2]
            weight, bias = (
                get_attr_value(gm, str(a.target)) if isinstance(a, fx.Node) else None for a in affine
            )
            if (weight is not None and not weight.eq(1).all()) or (bias is not None and bias.any()):
                found.append(node.name)
    return found


def check_scaled(name: str, size: int, folder: Path) -> None:
    model, x = network(name, size)
    captured = gs.capture(model, (x,))
    batch_norms = sum(op_name(node) == "batch_norm" for node in captured.graph.nodes)
    assert batch_norms or (vector_scales(captured) and norm_affines(captured)), "there is nothing to fold"
    result = gs.optimize(model, (x,))
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert not vector_scales(result.graph_module)
    assert not norm_affines(result.graph_module)
    assert not any(op_name(node) == "batch_norm" for node in result.graph_module.graph.nodes)
    exported = result.export_onnx(folder / "ours.onnx")
    assert exported.verdict is not None
    assert exported.verdict.ok
    assert not gs.optimize(result.module, (x,), verify="off").report.changes, "a second run found something"


@pytest.mark.slow
def test_leaves_no_layer_scale_and_no_norm_affine(tmp_path: Path) -> None:
    check_scaled("convnext_tiny", SCALED["convnext_tiny"], tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("name", SCALED)
def test_leaves_no_layer_scale_and_no_norm_affine_anywhere(name: str, tmp_path: Path) -> None:
    check_scaled(name, SCALED[name], tmp_path)


# -- adapters -----------------------------------------------------------------------------------------------


def adapted(hidden: int, layers: int) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A BERT with a trained LoRA adapter on every Linear, the same without, and inputs."""
    import peft  # here, for they take seconds
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        intermediate_size=4 * hidden,
    )
    base = transformers.BertModel(config).eval()
    wrapped = copy.deepcopy(base)
    linears = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    lora = peft.LoraConfig(r=4, target_modules=sorted(linears))
    model = peft.get_peft_model(wrapped, lora).get_base_model().eval()
    adapters = [module for name, module in model.named_modules() if name.endswith("lora_B.default")]
    assert len(adapters) == len(linears)
    with torch.no_grad():
        for adapter in adapters:  # peft starts them at zero
            adapter.weight.normal_(std=0.1)
    inputs = {"input_ids": torch.randint(100, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    inputs["attention_mask"][1, 5:] = 0
    return model, base, inputs


# peft still reads what transformers has renamed
renamed = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def products(path: Path) -> int:
    """Matrix products of a file, before onnxruntime sees it."""
    counts = node_counts(path)
    return counts.get("Gemm", 0) + counts.get("MatMul", 0)


def check_adapted(hidden: int, layers: int, folder: Path) -> None:
    model, base, inputs = adapted(hidden, layers)
    result = gs.optimize(model, inputs)
    assert result.report.verification is not None
    assert result.report.verification.ok
    exported = result.export_onnx(folder / "ours.onnx")
    assert exported.verdict is not None
    assert exported.verdict.ok
    info = capture_info(result.graph_module)
    export_onnx(model, info, folder / "adapted.onnx", verify=False)
    export_onnx(base, info, folder / "base.onnx", verify=False)
    with_adapters, without, ours = (
        products(folder / f"{which}.onnx") for which in ("adapted", "base", "ours")
    )
    assert without < with_adapters, "there is nothing to fold"
    assert ours <= without
    assert not gs.optimize(result.module, inputs, verify="off").report.changes, "a second run found something"


@renamed
@pytest.mark.slow
def test_leaves_no_more_layers_than_the_network_without_adapters(tmp_path: Path) -> None:
    check_adapted(32, 2, tmp_path)


@renamed
@pytest.mark.sweep
def test_leaves_no_more_layers_than_a_bert_without_adapters(tmp_path: Path) -> None:
    check_adapted(768, 12, tmp_path)
