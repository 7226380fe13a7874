// The Python module fisherkern._C: addresses and sizes in, nothing out, errors as exceptions
// (ValueError for bad arguments, RuntimeError for CUDA). The tensors' types, sizes and
// devices are the caller's business (fisherkern/ops/_extension.py); addresses say nothing.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "attention.h"
#include "fisher_segment.h"
#include "layer_norm.h"

// What setup.py compiled for: compute capabilities of machine code, and of PTX.
#ifndef FISHERKERN_CUDA_ARCHS
#define FISHERKERN_CUDA_ARCHS
#endif
#ifndef FISHERKERN_CUDA_PTX
#define FISHERKERN_CUDA_PTX
#endif
// And from: the sha256 of the CUDA kernels' sources, none where they were not compiled.
#ifndef FISHERKERN_CUDA_SOURCES
#define FISHERKERN_CUDA_SOURCES
#endif
#define FISHERKERN_QUOTED_TEXT(text) #text
#define FISHERKERN_QUOTED(macro) FISHERKERN_QUOTED_TEXT(macro)

namespace py = pybind11;
using namespace py::literals;

namespace fisherkern {
namespace {

using Address = uintptr_t;

void require(bool holds, const std::string& otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

using Sizes = std::initializer_list<std::pair<const char*, int64_t>>;
using Addresses = std::initializer_list<std::pair<const char*, Address>>;

void require_sizes(const std::string& op, Sizes sizes) {
  for (const auto& [name, size] : sizes) {
    require(size >= 0, op + ": " + name + " must not be negative, got " + std::to_string(size));
  }
}

void require_addresses(const std::string& op, Addresses addresses) {
  for (const auto& [name, address] : addresses) {
    require(address != 0, op + ": " + name + " is a null address");
  }
}

SegmentOuterSquare segment_problem(Address fisher, Address delta, Address inputs, Address offsets,
                                   int offset_bytes, int64_t length, int64_t probes,
                                   int64_t positions, int64_t segments, int64_t rows,
                                   int64_t columns, int precision) {
  const std::string op = "segment_outer_square";
  require_sizes(op, {{"length", length},
                     {"probes", probes},
                     {"positions", positions},
                     {"segments", segments},
                     {"rows", rows},
                     {"columns", columns}});
  require(offset_bytes == 0 || offset_bytes == 4 || offset_bytes == 8,
          op + ": offset_bytes must be 0, 4 or 8, got " + std::to_string(offset_bytes));
  require(precision >= 0 && precision <= 2,
          op + ": precision must be 0 (fp32), 1 (tf32) or 2 (bf16), got " +
              std::to_string(precision));
  if (rows > 0 && columns > 0) require_addresses(op, {{"fisher", fisher}});
  if (probes * positions * rows > 0) require_addresses(op, {{"delta", delta}});
  if (positions * columns > 0) require_addresses(op, {{"inputs", inputs}});
  if (offset_bytes > 0) {
    require_addresses(op, {{"offsets", offsets}});
  } else {
    require(segments * length <= positions,
            op + ": " + std::to_string(segments) + " segments of " + std::to_string(length) +
                " do not fit into " + std::to_string(positions) + " positions");
  }
  return {reinterpret_cast<float*>(fisher),
          reinterpret_cast<const void*>(delta),
          reinterpret_cast<const void*>(inputs),
          reinterpret_cast<const void*>(offsets),
          offset_bytes,
          length,
          probes,
          positions,
          segments,
          rows,
          columns,
          static_cast<Precision>(precision)};
}

LookupSquare lookup_problem(Address fisher, Address delta, Address order, Address segment_start,
                            Address row, Address row_start, Address beta, Address hidden,
                            Address sequence, int64_t probes, int64_t positions, int64_t segments,
                            int64_t groups, int64_t rows, int64_t width, int64_t sequences,
                            bool delta_bf16) {
  const std::string op = "lookup_square";
  require_sizes(op, {{"probes", probes},
                     {"positions", positions},
                     {"segments", segments},
                     {"groups", groups},
                     {"rows", rows},
                     {"width", width},
                     {"sequences", sequences}});
  if (rows * width > 0) require_addresses(op, {{"fisher", fisher}});
  if (probes * positions * width > 0) require_addresses(op, {{"delta", delta}});
  require_addresses(op, {{"segment_start", segment_start}, {"row_start", row_start}});
  if (segments > 0) require_addresses(op, {{"row", row}});
  if (beta != 0) require_addresses(op, {{"hidden", hidden}, {"sequence", sequence}});
  return {reinterpret_cast<float*>(fisher),
          reinterpret_cast<const void*>(delta),
          reinterpret_cast<const int64_t*>(order),
          reinterpret_cast<const int64_t*>(segment_start),
          reinterpret_cast<const int64_t*>(row),
          reinterpret_cast<const int64_t*>(row_start),
          reinterpret_cast<const float*>(beta),
          reinterpret_cast<const float*>(hidden),
          reinterpret_cast<const int64_t*>(sequence),
          probes,
          positions,
          segments,
          groups,
          rows,
          width,
          sequences,
          delta_bf16};
}

AttentionBackward attention_problem(Address p, Address delta, Address q, Address k, Address v,
                                    Address dq, Address dk, Address dv, int64_t probes,
                                    int64_t sequences, int64_t heads, int64_t queries, int64_t keys,
                                    int64_t width, int64_t value_width, float scale) {
  const std::string op = "attention_backward";
  require_sizes(op, {{"probes", probes},
                     {"sequences", sequences},
                     {"heads", heads},
                     {"queries", queries},
                     {"keys", keys},
                     {"width", width},
                     {"value_width", value_width}});
  const int64_t count = probes * sequences * heads;
  if (count * queries * keys > 0) require_addresses(op, {{"p", p}});
  if (count * queries * width > 0) require_addresses(op, {{"q", q}, {"dq", dq}});
  if (count * keys * width > 0) require_addresses(op, {{"k", k}, {"dk", dk}});
  if (count * keys * value_width > 0) require_addresses(op, {{"v", v}, {"dv", dv}});
  if (count * queries * value_width > 0) require_addresses(op, {{"delta", delta}});
  return {reinterpret_cast<const float*>(p),
          reinterpret_cast<const float*>(delta),
          reinterpret_cast<const float*>(q),
          reinterpret_cast<const float*>(k),
          reinterpret_cast<const float*>(v),
          reinterpret_cast<float*>(dq),
          reinterpret_cast<float*>(dk),
          reinterpret_cast<float*>(dv),
          probes,
          sequences,
          heads,
          queries,
          keys,
          width,
          value_width,
          scale};
}

void segment_outer_square_in(const SegmentOuterSquare& problem, int threads, int lanes, int form) {
  require(form >= 0 && form <= 2,
          "segment_outer_square: form must be 0 (the cheaper), 1 (direct) or 2 (Gram), got " +
              std::to_string(form));
  segment_outer_square_cpu(problem, threads, lanes, static_cast<Form>(form));
}

LayerNormBackward layer_norm_problem(Address delta, Address normalised, Address weight,
                                     Address rstd, Address result, int64_t probes, int64_t rows,
                                     int64_t width) {
  const std::string op = "layer_norm_backward";
  require_sizes(op, {{"probes", probes}, {"rows", rows}, {"width", width}});
  if (probes * rows * width > 0) {
    require_addresses(op, {{"delta", delta},
                           {"normalised", normalised},
                           {"weight", weight},
                           {"rstd", rstd},
                           {"result", result}});
  }
  return {reinterpret_cast<const float*>(delta),
          reinterpret_cast<const float*>(normalised),
          reinterpret_cast<const float*>(weight),
          reinterpret_cast<const float*>(rstd),
          reinterpret_cast<float*>(result),
          probes,
          rows,
          width};
}

// The parameters of the problems by name, in the order of the functions above.
#define SEGMENT_ARGUMENTS                                                                   \
  "fisher"_a, "delta"_a, "inputs"_a, "offsets"_a, "offset_bytes"_a, "length"_a, "probes"_a, \
      "positions"_a, "segments"_a, "rows"_a, "columns"_a, "precision"_a
#define LOOKUP_ARGUMENTS                                                                      \
  "fisher"_a, "delta"_a, "order"_a, "segment_start"_a, "row"_a, "row_start"_a, "beta"_a,      \
      "hidden"_a, "sequence"_a, "probes"_a, "positions"_a, "segments"_a, "groups"_a, "rows"_a, \
      "width"_a, "sequences"_a, "delta_bf16"_a

#define ATTENTION_ARGUMENTS                                                                     \
  "p"_a, "delta"_a, "q"_a, "k"_a, "v"_a, "dq"_a, "dk"_a, "dv"_a, "probes"_a, "sequences"_a,     \
      "heads"_a, "queries"_a, "keys"_a, "width"_a, "value_width"_a, "scale"_a

#define LAYER_NORM_ARGUMENTS                                                                     \
  "delta"_a, "normalised"_a, "weight"_a, "rstd"_a, "result"_a, "probes"_a, "rows"_a, "width"_a

// A function of Python from the one that makes the problem and the one that works on it, which
// may take more arguments (threads).
template <class Problem, class... Arguments, class... More>
auto on_cpu(Problem (*make)(Arguments...), void (*work)(const Problem&, More...)) {
  return [=](Arguments... arguments, More... more) { work(make(arguments...), more...); };
}

#ifdef FISHERKERN_WITH_CUDA
template <class Problem, class... Arguments>
auto on_cuda(const char* op, Problem (*make)(Arguments...),
             void (*work)(const Problem&, const Launch&)) {
  return [=](Arguments... arguments, int device, uint64_t stream, int tile, int64_t splits,
             Address workspace) {
    const std::string name = op;
    require(tile == 64 || tile == 128,
            name + ": tile must be 64 or 128, got " + std::to_string(tile));
    require(splits >= 1, name + ": splits must be at least 1, got " + std::to_string(splits));
    if (splits > 1) require_addresses(name, {{"workspace", workspace}});
    work(make(arguments...), {device, stream, tile, splits, reinterpret_cast<float*>(workspace)});
  };
}
#define LAUNCH_ARGUMENTS "device"_a, "stream"_a, "tile"_a, "splits"_a, "workspace"_a
#endif

py::tuple numbers(std::initializer_list<int> values) {
  py::list list;
  for (int value : values) list.append(value);
  return py::tuple(list);
}

}  // namespace
}  // namespace fisherkern

PYBIND11_MODULE(_C, m) {
  using namespace fisherkern;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.doc() = "fisherkern's compiled kernels; see csrc/*.h.";
  m.attr("cuda_archs") = numbers({FISHERKERN_CUDA_ARCHS});
  m.attr("cuda_ptx") = numbers({FISHERKERN_CUDA_PTX});
  m.attr("cuda_sources") = FISHERKERN_QUOTED(FISHERKERN_CUDA_SOURCES);
  m.def("segment_outer_square_cpu", on_cpu(segment_problem, segment_outer_square_in), py::kw_only(),
        SEGMENT_ARGUMENTS, "threads"_a = 1, "lanes"_a = 0, "form"_a = 0, Unlocked());
  m.def("lookup_square_cpu", on_cpu(lookup_problem, lookup_square_cpu), py::kw_only(),
        LOOKUP_ARGUMENTS, Unlocked());
  m.def("attention_backward_cpu", on_cpu(attention_problem, attention_backward_cpu), py::kw_only(),
        ATTENTION_ARGUMENTS, "threads"_a = 1, "lanes"_a = 0, Unlocked());
  m.def("layer_norm_backward_cpu", on_cpu(layer_norm_problem, layer_norm_backward_cpu),
        py::kw_only(), LAYER_NORM_ARGUMENTS, "threads"_a = 1, "lanes"_a = 0, Unlocked());
#ifdef FISHERKERN_WITH_CUDA
  m.def("segment_outer_square_cuda",
        on_cuda("segment_outer_square", segment_problem, segment_outer_square_cuda), py::kw_only(),
        SEGMENT_ARGUMENTS, LAUNCH_ARGUMENTS, Unlocked());
  m.def("lookup_square_cuda", on_cuda("lookup_square", lookup_problem, lookup_square_cuda),
        py::kw_only(), LOOKUP_ARGUMENTS, LAUNCH_ARGUMENTS, Unlocked());
#endif
}
