"""From the author's module to a compiled model, in the order a reader expects: capture, passes, load, insertion, compile."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ad_core.api.errors import ConfigError
from ad_core.api.loading import CompileBackend
from ad_core.api.passes import Pass
from ad_core.api.types import ENTRY_POINT_GROUP, Environment, Limits, Stage
from ad_core.backends import BACKENDS
from ad_core.cache.build import build_model, measure_workspace
from ad_core.cache.insert import InsertCaches, Served
from ad_core.cache.model import CachedModel
from ad_core.capture import ModelSource, capture, load_weights, open_model
from ad_core.config import EngineConfig, make_config, plugin_options
from ad_core.graph.edit import output_node, tensor_at, tensors_read
from ad_core.graph.ops import qualified_name
from ad_core.graph.unclaimed import RegistryHint
from ad_core.passes.core import clean_passes, compile_passes, engine_passes
from ad_core.passes.manager import PassManager
from ad_core.plan import Plan
from ad_core.progress import Progress, Silent, memory_words
from ad_core.registry import Registry
from ad_core.registry.arbitrate import check_choices
from ad_core.registry.choices import KernelChoices
from ad_core.registry.index import install_hint
from ad_core.registry.records import State

CORE = "ad-core"


@dataclass(frozen=True)
class Built:
    """A model that is ready to run, and where it came from."""

    model: CachedModel
    source: ModelSource
    plan: Plan


def build(model: str | Path | nn.Module, config: EngineConfig, *, tokenizer: Any = None, progress: Progress | None = None) -> Built:
    """The whole way: what `LLM` does before its engine starts. Raises the errors of every room that it goes through."""
    way = _Pipeline(model, config, tokenizer, progress or Silent())
    return way.cached()


def outline(model: str | Path | nn.Module, config: EngineConfig) -> Plan:
    """The plan of `build` without its cost: weights are not loaded, so numbers are not compared and no memory is taken."""
    way = _Pipeline(model, config.model_copy(update={"verify": False}), None, Silent())
    way.planned()
    return way.plan


class CompiledGraph:
    """The canonical graph of a model, compiled and uncached: whole sequences in, logits out. Stateless, so it is the oracle."""

    def __init__(self, call: Callable[..., Any], takes_positions: bool, plan: Plan, graph: GraphModule):
        self._call, self._takes_positions, self.plan, self.graph = call, takes_positions, plan, graph

    @torch.inference_mode()
    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, S, V] of ids [B, S]; positions count from 0 if they are not given."""
        if not self._takes_positions:
            logits: torch.Tensor = self._call(input_ids)
            return logits
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        logits = self._call(input_ids, position_ids)
        return logits


def compile(module: nn.Module | str | Path, example_ids: torch.Tensor | None = None, **options: Any) -> CompiledGraph:
    """Captures a model and compiles its canonical graph, without caches.

    `example_ids` [B, S] are run once, so that a shape or a device that the graph cannot take shows here. `options` are those of
    `LLM` that have a meaning without an engine (device, dtype, plugins, backend, verify, trust_remote_code ...).
    """
    way = _Pipeline(module, make_config(options), None, Silent())
    return way.uncached(example_ids)


class _Pipeline:
    """One model on its way. Every step writes what it did to `plan`."""

    def __init__(self, model: str | Path | nn.Module, config: EngineConfig, tokenizer: Any, progress: Progress):
        self.config, self.progress, self.plan = config, progress, Plan()
        self.device = _device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        with self._phase("plugins"):
            self.registry = Registry.load(allow=config.allow_plugins, deny=config.deny_plugins)
            self.options = plugin_options(config.plugins, self.registry.infos)
            check_choices(self.registry, config.kernels, config.prefer)
            self.plan.plugins = [
                {"name": r.name, "distribution": r.distribution, "version": r.version, "state": str(r.state), "reason": r.reason}
                for r in self.registry.plugins
            ]
        self.backend = _backend(config.backend, self.registry, self.device)
        if not isinstance(model, str | os.PathLike | nn.Module):
            raise ConfigError(f"a model cannot be a {type(model).__name__}", hint="give a directory, a .gguf file, or a torch.nn.Module")
        with self._phase("open"):
            self.source = open_model(
                model,
                loaders=self.registry.loaders(),
                trust_remote_code=config.trust_remote_code,
                tokenizer=tokenizer,
                dtype=config.dtype,
                max_model_len=config.max_model_len,
                eos_token_id=config.eos_token_id,
            )
        self.plan.model = self.source.describe()

    def cached(self) -> Built:
        """Capture to `CachedModel`."""
        insertion, choices, manager = self._insertion()
        graph = self._captured(manager)
        self._load(manager, graph)
        self._insert(manager, graph, choices)
        vocab_size = _width(graph)
        self._check_ends(vocab_size)
        loaded = _held(graph)
        with self._phase("compile"):
            self._run(manager, graph, Stage.COMPILE)
            call = self.backend.compile(graph)
        self._weigh(loaded, _held(graph))
        with self._phase("pools"):
            model = build_model(
                call,
                insertion.layout,
                memory=self.config.memory,
                vocab_size=vocab_size,
                device=self.device,
                checkpoint_interval=self.config.checkpoint_interval if self.config.prefix_cache else None,
            )
        with self._phase("warm up"):
            workspace = measure_workspace(model)
        self._ledger(model, workspace)
        return Built(model, self.source, self.plan)

    def planned(self) -> None:
        """Capture to insertion on weights that are not there: everything that is decided, and nothing that is computed."""
        _, choices, manager = self._insertion()
        self._insert(manager, self._captured(manager), choices)

    def uncached(self, example_ids: torch.Tensor | None) -> CompiledGraph:
        """Capture to `CompiledGraph`."""
        manager = self._manager([])
        graph = self._captured(manager)
        self._load(manager, graph)
        takes_positions = any(node.op == "placeholder" and node.target == "position_ids" for node in graph.graph.nodes)
        with self._phase("passes"):
            self._run(manager, graph, Stage.FUSE, Stage.COMPILE)
        with self._phase("compile"):
            compiled = CompiledGraph(self.backend.compile(graph), takes_positions, self.plan, graph)
        if example_ids is not None:
            compiled(example_ids.to(self.device))
        return compiled

    # -- parts --------------------------------------------------------------------------------------------------------

    def _captured(self, manager: PassManager) -> GraphModule:
        """The canonical graph: stages CLEAN to SHARD."""
        with self.progress.phase("capturing"), self._counted() as count:
            captured = capture(
                self.source,
                plan=self.plan,
                seams=self.registry.seams(),
                matchers=self.registry.matchers(),
                ops=[qualified_name(offer.item.op) for offer in self.registry.canonical_ops()],
                device=self.device,
                clean=lambda graph: self._run(manager, graph, Stage.CAPTURE, Stage.CLEAN),
                verify=self.config.verify,
                hint=self._hint(),
                progress=count,
            )
        graph = captured.graph
        with self._phase("passes"):
            self._run(manager, graph, Stage.MATCH, Stage.QUANTIZE, Stage.SHARD)
        return graph

    def _load(self, manager: PassManager, graph: GraphModule) -> None:
        with self._phase("weights"), self._counted() as count:
            load_weights(graph, self.source, self.device, count)
            self._run(manager, graph, Stage.LOAD)

    def _insertion(self) -> tuple[InsertCaches, KernelChoices, PassManager]:
        limits = _limits(self.config, self.source)
        choices = KernelChoices(self.registry, _environment(self.device, limits), self.config.kernels, self.config.prefer)
        served = [Served(offer.item, self.options.get(offer.plugin, {})) for offer in self.registry.canonical_ops()]
        insertion = InsertCaches(served, choices.choose, limits, self.plan)
        return insertion, choices, self._manager([*engine_passes(), insertion])

    def _insert(self, manager: PassManager, graph: GraphModule, choices: KernelChoices) -> None:
        with self._phase("passes"):
            self._run(manager, graph, Stage.FUSE, Stage.CACHE)
        self.plan.decisions += choices.decisions
        self.plan.nodes = len(graph.graph.nodes)

    def _manager(self, extra: Sequence[Pass]) -> PassManager:
        core: list[Pass] = [*clean_passes(), *extra, *compile_passes(self.config.backend)]
        offers: list[tuple[Pass, str, Mapping[str, Any]]] = [(each, CORE, {}) for each in core]
        offers += [(offer.item, offer.distribution, self.options.get(offer.plugin, {})) for offer in self.registry.passes()]
        return PassManager(offers, self.plan, verify=bool(self.config.verify))

    def _run(self, manager: PassManager, graph: GraphModule, *stages: Stage) -> None:
        manager.run(graph, stages, device=self.device, dtype=self.source.dtype)

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self.plan.phase(name)

    def _counted(self) -> AbstractContextManager[Callable[[int, int], None]]:
        return self.progress.counting("weights", "bytes")

    def _hint(self) -> RegistryHint:
        model_type = getattr(self.source.config, "model_type", None)
        records = self.registry.plugins
        return RegistryHint(
            known=[f"For model type {model_type!r}: {install_hint(self.registry, model_type=model_type)}"] if model_type else (),
            installed=[f"{record.name} {record.version}" for record in records if record.state is State.LOADED],
            broken=[record.line for record in records if record.state is not State.LOADED],
            searched=f"{sys.executable}, group {ENTRY_POINT_GROUP}",
        )

    def _check_ends(self, vocab_size: int) -> None:
        """The model's own ends may lie outside of a cut vocabulary; what a person asks for may not."""
        asked = self.config.eos_token_id
        for index in asked if isinstance(asked, list) else [] if asked is None else [asked]:
            if not 0 <= index < vocab_size:
                raise ConfigError(f"eos_token_id {index} can never be sampled", why=f"the model's vocabulary has ids 0 to {vocab_size - 1}")

    def _weigh(self, loaded: Mapping[int, int], compiled: Mapping[int, int]) -> None:
        """Weights as they were loaded, and what COMPILE has there twice: packed beside the original that something still reads."""
        memory = self.plan.memory
        memory["weights"] = sum(loaded.values())
        made = sum(compiled[place] for place in compiled.keys() - loaded.keys())
        released = 0 if self.source.in_memory else sum(loaded[place] for place in loaded.keys() - compiled.keys())
        if made > released:
            memory["packed copies"] = made - released

    def _ledger(self, model: CachedModel, workspace: int | None) -> None:
        memory = self.plan.memory
        memory["pools"], memory["buffers"] = model.pools.pool_bytes, model.pools.buffer_bytes
        if workspace is None:
            self.plan.notes.append("the workspace of a step is not measured: this system does not tell a process its peak memory")
        else:
            memory["workspace"] = workspace
        memory["total"] = sum(memory.values())
        memory["cache tokens"] = model.sizes.capacity_tokens(model.limits.page_size)
        self.progress.say(f"memory: {', '.join(memory_words(memory))}")
        self.progress.say(f"start: {', '.join(f'{name} {seconds:.1f} s' for name, seconds in self.plan.phases.items())}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"there is no device {name!r}", why=str(error).splitlines()[0], hint='"auto", "cpu", "cuda" or "cuda:1"'
        ) from error
    if device.type == "meta":
        raise ConfigError("nothing is computed on the device 'meta'", hint="`ad explain` shows the plan of a model without loading it")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"the device {name!r} was asked for, but this torch sees no GPU", why=f"torch {torch.__version__}", hint='device="cpu"'
        )
    return device


def _backend(name: str, registry: Registry, device: torch.device) -> CompileBackend:
    known: dict[str, CompileBackend] = {backend.name: backend for backend in BACKENDS}
    known |= {offer.item.name: offer.item for offer in registry.compilers()}
    if name not in known:
        raise ConfigError(f"there is no compile backend {name!r}", where="backend", hint=f"known are: {', '.join(sorted(known))}")
    declined = known[name].supports(device)
    if declined is not None:
        raise ConfigError(f"the compile backend {name!r} does not work here", where="backend", why=declined.reason)
    return known[name]


def _limits(config: EngineConfig, source: ModelSource) -> Limits:
    length = source.max_model_len
    if length is None:
        raise ConfigError(
            "the longest sequence of this model is not known", why="it has no configuration that says so", hint="give max_model_len=..."
        )
    return Limits(config.max_batch_tokens, config.max_requests, length, config.page_size)


def _environment(device: torch.device, limits: Limits) -> Environment:
    return Environment(
        device=device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        page_size=limits.page_size,
        interpret=os.environ.get("TRITON_INTERPRET") == "1",
    )


def _held(graph: GraphModule) -> dict[int, int]:
    """Bytes of every tensor that the graph reads, by where it lies: tied ones once. A packed one has no address, only an identity."""
    tensors = [tensor for path in tensors_read(graph) if (tensor := tensor_at(graph, path)) is not None]
    return {
        tensor.data_ptr() if tensor.layout == torch.strided else id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors
    }


def _width(graph: GraphModule) -> int:
    """The size of the vocabulary: the last dimension of the logits."""
    logits = output_node(graph.graph).args[0]
    assert isinstance(logits, Node)
    return int(logits.meta["val"].shape[-1])
