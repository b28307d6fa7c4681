"""The publications that this package builds on: registrations name them, model cards cite them.

No torch here, so that a card is rendered fast.
"""

from typing import NamedTuple


class Reference(NamedTuple):
    """A publication.

    Attributes:
        key: The key of the BibTeX entry.
        authors: The authors, separated by "and" as in BibTeX.
        title: The title as published.
        year: The year of publication.
        url: The address of the paper; empty where none is known for sure.
        venue: The journal or conference; empty for a preprint.
    """

    key: str
    authors: str
    title: str
    year: str
    url: str = ""
    venue: str = ""

    @property
    def short(self) -> str:
        """The authors' surnames and the year, such as "An et al., 2024"."""
        surnames = [author.split(",")[0] for author in self.authors.split(" and ")]
        if len(surnames) > 2 or surnames[-1] == "others":
            return f"{surnames[0]} et al., {self.year}"
        names = surnames[0] if len(surnames) == 1 else f"{surnames[0]} and {surnames[1]}"
        return f"{names}, {self.year}"

    def bibtex(self) -> str:
        """Return the BibTeX entry."""
        fields = {"author": self.authors, "title": f"{{{self.title}}}", "year": self.year}
        fields |= {"howpublished": self.venue} if self.venue else {}
        fields |= {"url": self.url} if self.url else {}
        lines = "".join(f"  {name:<12} = {{{value}}},\n" for name, value in fields.items())
        return f"@misc{{{self.key},\n{lines}}}"


OBS = Reference(
    "hassibi1993obs",
    "Hassibi, Babak and Stork, David G.",
    "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon",
    "1993",
    venue="Advances in Neural Information Processing Systems 5",
)
SPARSEGPT = Reference(
    "frantar2023sparsegpt",
    "Frantar, Elias and Alistarh, Dan",
    "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    "2023",
    "https://arxiv.org/abs/2301.00774",
)
INTRA_FUSION = Reference(
    "theus2024metapruning",
    "Theus, Alexander and Geimer, Olin and Wicke, Friedrich and Hofmann, Thomas and Anagnostidis, Sotiris and "
    "Singh, Sidak Pal",
    "Towards Meta-Pruning via Optimal Transport",
    "2024",
    "https://arxiv.org/abs/2402.07839",
)
FLAP = Reference(
    "an2024flap",
    "An, Yongqi and Zhao, Xu and Yu, Tao and Tang, Ming and Wang, Jinqiao",
    "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    "2024",
    "https://arxiv.org/abs/2312.11983",
)
POT = Reference(
    "flamary2021pot",
    "Flamary, Rémi and others",
    "POT: Python Optimal Transport",
    "2021",
    "https://jmlr.org/papers/v22/20-451.html",
    "Journal of Machine Learning Research 22",
)
WANDA = Reference(
    "sun2024wanda",
    "Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico",
    "A Simple and Effective Pruning Approach for Large Language Models",
    "2024",
    "https://arxiv.org/abs/2306.11695",
)
SNIP = Reference(
    "lee2019snip",
    "Lee, Namhoon and Ajanthan, Thalaiyasingam and Torr, Philip H. S.",
    "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
    "2019",
    "https://arxiv.org/abs/1810.02340",
)
NETWORK_SIMPLEX = Reference(
    "bonneel2011displacement",
    "Bonneel, Nicolas and van de Panne, Michiel and Paris, Sylvain and Heidrich, Wolfgang",
    "Displacement Interpolation Using Lagrangian Mass Transport",
    "2011",
    "https://doi.org/10.1145/2070781.2024192",
)
SINKHORN = Reference(
    "cuturi2013sinkhorn",
    "Cuturi, Marco",
    "Sinkhorn Distances: Lightspeed Computation of Optimal Transportation Distances",
    "2013",
    "https://arxiv.org/abs/1306.0895",
)
PARTIAL_TRANSPORT = Reference(
    "chapel2020partial",
    "Chapel, Laetitia and Alaya, Mokhtar Z. and Gasso, Gilles",
    "Partial Optimal Transport with Applications on Positive-Unlabeled Learning",
    "2020",
    "https://arxiv.org/abs/2002.08276",
)
DISTILLATION = Reference(
    "hinton2015distilling",
    "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
    "Distilling the Knowledge in a Neural Network",
    "2015",
    "https://arxiv.org/abs/1503.02531",
)
UNBALANCED_TRANSPORT = Reference(
    "chizat2016scaling",
    "Chizat, Lenaic and Peyré, Gabriel and Schmitzer, Bernhard and Vialard, François-Xavier",
    "Scaling Algorithms for Unbalanced Transport Problems",
    "2016",
    "https://arxiv.org/abs/1607.05816",
)
