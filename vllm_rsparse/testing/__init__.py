# SPDX-License-Identifier: Apache-2.0
"""What the demo, the benchmarks and the tests share: servers, cases, tolerances."""
