"""Turns a .metal file into CUDA C++ that clang compiles to PTX: function constants are baked in, each kernel is an entry."""
from . import clang
from .rewrite import FILE_SCOPE, MOST_THREADS, Rewriter
from .signatures import assign_indices


class PtxRewriter(Rewriter):
    """`constants` are values by index."""

    def __init__(self, source, declarations, constants, kernels):
        super().__init__(source, declarations, execute=True, kernels=kernels)
        self.constants = constants
        missing = sorted(set(kernels or ()) - set(self.kernel_names()))
        if missing:
            raise clang.ClangError(f"there is no kernel '{missing[0]}'")
        self._require_constants()

    def buffers(self):
        """The buffer indices of each kernel, in the order of its entry's parameters."""
        return {
            name: [int(index) for kind, index in assign_indices(function) if kind == "buffer"]
            for function, name, _ in self.chosen
        }

    def _require_constants(self):
        guarded = self._guarded_constants()
        for function, name, _ in self.chosen:
            reached = self.declarations.uses(function.name) - guarded
            for variable in self.declarations.function_constants:
                index = int(variable.attributes["function_constant"])
                if variable.name in reached and index not in self.constants:
                    raise clang.ClangError(f"kernel '{name}' needs function constant {index}, {variable.name}")

    def _function_constants(self):
        for variable in self.declarations.function_constants:
            for i in range(variable.start, variable.end):
                if self.source[i] == "constant":
                    self._replace(i, "MSL_PER_LAUNCH")
                elif self.source[i] in ("static", "const"):
                    self._blank(i, i + 1)
            index = int(variable.attributes["function_constant"])
            self._insert(variable.end, f" = {self.constants.get(index, 0)}")
            given = str(index in self.constants).lower()
            self._append(variable.end, f" MSL_PER_LAUNCH bool msl_defined_{variable.name} = {given};")

    def _limit_threads(self, function, limit):
        """Nothing in the body: the entry says it, and each thread gets as many registers as there are for so many threads."""

    def _registration(self):
        """The entries: outside of the file's own namespace, which would hide them."""
        lines = ["}", "#pragma clang force_cuda_host_device end", '# 1 "<entries>"']
        for function, name, expression in self.chosen:
            parameters, arguments = [], []
            for i, (kind, index) in enumerate(assign_indices(function)):
                place = f"metal::ParameterType<{i}, decltype({expression})>"
                if kind == "buffer":
                    parameters.append(f"{place}::Passed buffer_{index}")
                    arguments.append(f"buffer_{index}")
                elif kind == "builtin":
                    arguments.append(f"metal::builtin_as<{place}::Type>(metal::builtin::{index}())")
                else:
                    raise clang.ClangError(f"kernel '{name}' takes threadgroup memory of the launch's: no PTX")
            limit = function.attributes.get(MOST_THREADS)
            if limit and not limit.isdigit():
                # Names of the file's, or of a template's, mean nothing out here.
                raise clang.ClangError(f"kernel '{name}': {MOST_THREADS}({limit}) is no number: no PTX")
            bounds = f", launch_bounds({limit})" if limit else ""
            lines.append(
                f'extern "C" __attribute__((__global__{bounds})) void {name}({", ".join(parameters)}) '
                f"{{ {expression}({', '.join(arguments)}); }}"
            )
        return "\n".join([*lines, FILE_SCOPE])
