"""One layer that an adapter is put on: shapes, scale, and the names of its tensors in files."""

from dataclasses import dataclass

from ratel.lora.describe.outline import EMBEDDING

PREFIX = "base_model.model."
PARAMETER = "parameter"
"""The kind of a layer that is a parameter of another module: a matrix, or the fused matrices of
experts."""


@dataclass(frozen=True, kw_only=True)
class AdaptedLayer:
    """A [a_rows, in] and B [out, b_columns] of a layer. With E experts and rank r, A is [E*r, in]
    with the expert slowest, and B [out, r*E] with the expert fastest: ``A.view(E, r, in)``,
    ``B.view(out, r, E)``. Of an embedding `in` counts tokens."""

    name: str
    parameter: str
    """The parameter of the module that is adapted."""
    kind: str
    in_features: int
    out_features: int
    experts: int = 1
    is_transposed: bool
    """Whether the weight is stored [in, out]."""
    is_stack: bool = False
    """Whether the weight has a dimension of experts, first."""
    rank: int
    alpha: float
    scale: float
    dropout: float
    """The dropout of what A sees. An embedding sees tokens, of which none is dropped, in peft,
    too."""
    has_magnitude: bool
    file_name: str
    """The name of the module in files, where parameters of one module are nested."""
    tied_to: str | None = None
    """The layer whose B and A, transposed, are this one's A and B."""

    @property
    def key(self) -> str:
        """Its name among all layers of a model."""
        return f"{self.name}.{self.parameter}" if self.kind == PARAMETER else self.name

    @property
    def weight(self) -> str:
        """The parameter of the model that it changes."""
        return f"{self.name}.{self.parameter}"

    @property
    def added(self) -> dict[str, str]:
        """By the names that its parameters have in an adapted model, those in files. A tied layer
        has none of its own."""
        before = f"{self.key}_" if self.kind == PARAMETER else f"{self.name}."
        names = {"lora_A": self.a_name, "lora_B": self.b_name, "lora_magnitude": self.magnitude_name}
        return {} if self.tied_to else {f"{before}{own}": name for own, name in names.items() if name is not None}

    @property
    def a_shape(self) -> tuple[int, int]:
        return (self.experts * self.rank, self.in_features)

    @property
    def b_shape(self) -> tuple[int, int]:
        return (self.out_features, self.rank * self.experts)

    @property
    def a_name(self) -> str:
        return f"{PREFIX}{self.file_name}.{'lora_embedding_A' if self.kind == EMBEDDING else 'lora_A.weight'}"

    @property
    def b_name(self) -> str:
        return f"{PREFIX}{self.file_name}.{'lora_embedding_B' if self.kind == EMBEDDING else 'lora_B.weight'}"

    @property
    def magnitude_name(self) -> str | None:
        return f"{PREFIX}{self.file_name}.lora_magnitude_vector" if self.has_magnitude else None

    @property
    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {self.a_name: self.a_shape, self.b_name: self.b_shape}
        return shapes | ({self.magnitude_name: (self.out_features,)} if self.magnitude_name else {})


@dataclass(frozen=True, kw_only=True)
class FullModule:
    """A module that is trained as a whole. ``parameters``: their names in the model, with
    shapes."""

    name: str
    parameters: dict[str, tuple[int, ...]]
    tied_to: str | None = None
    """The module whose weight is its own."""

    @property
    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{PREFIX}{name}": shape for name, shape in self.parameters.items()}
