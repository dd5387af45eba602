"""Contract of import-linter: some modules import the standard library and the packages that are named, nothing else."""

import sys
from typing import cast

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output
from importlinter.domain.helpers import module_expressions_to_modules
from importlinter.domain.imports import ModuleExpression


class OnlyContract(Contract):
    """`modules` and what lies in them import themselves, the standard library and `allowed`, in functions as well."""

    type_name = "only"

    modules = fields.SetField(subfield=fields.ModuleExpressionField())
    allowed = fields.SetField(subfield=fields.StringField(), required=False)

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        modules = cast("set[ModuleExpression]", self.modules)
        roots = {module.name for module in module_expressions_to_modules(graph, modules)}
        own = roots.union(*(graph.find_descendants(root) for root in roots))
        allowed = sys.stdlib_module_names | cast("set[str]", self.allowed or set())
        refused = sorted(
            (module, imported)
            for module in own
            for imported in graph.find_modules_directly_imported_by(module)
            if imported not in own and imported.partition(".")[0] not in allowed
        )
        return ContractCheck(kept=not refused, metadata={"refused": refused})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for module, imported in check.metadata["refused"]:
            output.print_error(f"{module} is not allowed to import {imported}")
