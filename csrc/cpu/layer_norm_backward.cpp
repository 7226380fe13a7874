// Layer normalisation's backward pass: each row is read twice, the second time from the cache. The
// probes come one after another, as memory has them: what they share is small beside them.

#include "../layer_norm.h"
#include "machine.h"

namespace fisherkern {
namespace {

template <int kLanes>
FISHERKERN_INLINE void backward(const float* delta, const float* normalised, const float* weight,
                                float rstd, int64_t width, float* result) {
  typedef typename Lanes<kLanes>::Vector Vector;
  const Vector* d = reinterpret_cast<const Vector*>(delta);
  const Vector* n = reinterpret_cast<const Vector*>(normalised);
  const Vector* w = reinterpret_cast<const Vector*>(weight);
  Vector* out = reinterpret_cast<Vector*>(result);
  const int64_t vectors = width / kLanes;
  Vector sums = {}, projections = {};
  for (int64_t j = 0; j < vectors; ++j) {
    const Vector g = d[j] * w[j];
    sums += g;
    projections += g * n[j];
  }
  float sum = sum_of<kLanes>(sums), projection = sum_of<kLanes>(projections);
  for (int64_t i = vectors * kLanes; i < width; ++i) {
    const float g = delta[i] * weight[i];
    sum += g;
    projection += g * normalised[i];
  }
  const float mean = sum / width, slope = projection / width;
  for (int64_t j = 0; j < vectors; ++j) {
    out[j] = rstd * (d[j] * w[j] - mean - n[j] * slope);
  }
  for (int64_t i = vectors * kLanes; i < width; ++i) {
    result[i] = rstd * (delta[i] * weight[i] - mean - normalised[i] * slope);
  }
}

// Rows first to last of every probe.
using Work = void (*)(const LayerNormBackward&, int64_t first, int64_t last);

template <int kLanes>
FISHERKERN_INLINE void rows(const LayerNormBackward& x, int64_t first, int64_t last) {
  for (int64_t r = 0; r < x.probes; ++r) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t shared = row * x.width, own = (r * x.rows + row) * x.width;
      backward<kLanes>(x.delta + own, x.normalised + shared, x.weight, x.rstd[row], x.width,
                       x.result + own);
    }
  }
}

void rows_plain(const LayerNormBackward& problem, int64_t first, int64_t last) {
  rows<4>(problem, first, last);
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) void rows_avx2(const LayerNormBackward& problem, int64_t first,
                                                   int64_t last) {
  rows<8>(problem, first, last);
}

__attribute__((target("avx512f"))) void rows_avx512(const LayerNormBackward& problem, int64_t first,
                                                    int64_t last) {
  rows<16>(problem, first, last);
}
#else
constexpr Work rows_avx2 = nullptr, rows_avx512 = nullptr;
#endif

}  // namespace

void layer_norm_backward_cpu(const LayerNormBackward& problem, int threads, int lanes) {
  const Work work = widest<Work>("layer_norm_backward", lanes, rows_plain, rows_avx2, rows_avx512);
  in_shares(problem.rows, threads,
            [&](int64_t first, int64_t last) { work(problem, first, last); });
}

}  // namespace fisherkern
