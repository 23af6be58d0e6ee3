"""The plugin against the core's conformance kit."""

from ad_core.testing import OpConformance


class TestExperts(OpConformance):
    op = "ad_moe.moe:Experts"
    cases = "ad_moe.testing:CASES"
    kernels = ("moe.torch", "moe.native")
    min_checks = 270


class TestRoutedLinear(OpConformance):
    op = "ad_moe.moe:RoutedLinear"
    cases = "ad_moe.testing:LINEAR_CASES"
    kernels = ("moe.linear.torch", "moe.linear.native")
    min_checks = 34
