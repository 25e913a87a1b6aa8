# SPDX-License-Identifier: Apache-2.0
"""How much of what a decoded token reads is in the linears that an artifact lists."""

from vllm_rsparse.artifact.schema import ArtifactInfo

# Key of the provenance: elements of weight matrices by part of the model.
TOKEN_READS = "token_reads"


def token_shares(info: ArtifactInfo) -> dict[str, float]:
    """The share of each part of the model in the weights that a token reads.

    Parts are "linears" (that the artifact lists), "experts" (the routed ones that a
    token chooses), "others" (in the decoder layers) and "head". Empty if ``prepare`` of
    an older version made the artifact.
    """
    reads = info.provenance.get(TOKEN_READS)
    if not isinstance(reads, dict):
        return {}
    parts = {k: v for k, v in reads.items() if isinstance(v, int) and v >= 0}
    total = sum(parts.values())
    return {part: size / total for part, size in parts.items()} if total else {}


def covered(info: ArtifactInfo) -> str:
    """The listed linears' share, to be appended to a message; empty if not known."""
    share = token_shares(info).get("linears")
    if share is None:
        return ""
    return f", which cover {share:.0%} of the weights that a token reads"
