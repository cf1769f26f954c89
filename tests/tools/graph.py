"""A workflow written down as Python: nodes in groups and columns, links as values. No coordinates, no ids."""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Output:
    """One output of a node; a node itself stands for its first output."""

    node: int
    index: int = 0

    def __getitem__(self, index):
        return Output(self.node, index)


@dataclass
class Graph:
    """`group()` and `column()` say where the nodes that follow are drawn: groups from left to right, or one below the
    other; in a group columns from left to right, in a column nodes from top to bottom."""

    nodes: list = field(default_factory=list)
    links: list = field(default_factory=list)
    groups: list = field(default_factory=list)

    def group(self, title, color, below=False):
        self.groups.append({"title": title, "color": color, "below": below, "columns": []})

    def column(self, width):
        self.groups[-1]["columns"].append({"width": width, "nodes": []})

    def add(self, kind, title=None, tall=0, models=(), **values):
        """A node of type `kind`, at least `tall`: Outputs among `values` become links, the rest widget values."""
        number = len(self.nodes) + 1
        given = {name: value for name, value in values.items() if not isinstance(value, Output)}
        self.nodes.append({"id": number, "type": kind, "title": title, "tall": tall, "models": list(models),
                           "widgets": given})
        self.links += [[value.node, value.index, number, name] for name, value in values.items()
                       if isinstance(value, Output)]
        self.groups[-1]["columns"][-1]["nodes"].append(number)
        return Output(number)

    def as_dict(self):
        return {"nodes": self.nodes, "links": self.links, "groups": self.groups}
