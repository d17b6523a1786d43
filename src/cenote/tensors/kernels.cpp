// CPU kernels for packed (padding-free) inference, fp32 only.
//
//   packed_attention   softmax(scale * Q K^T) V within each sequence of a packed batch and its prefix
//   rms_norm           rows over their root mean square
//   linear_chain       Linear layers with what follows them: bias, activation, residual and LayerNorm
//
// Plain C interface, no dependency on torch headers: builds in a second or two and is
// loaded with ctypes.  Uses the vector extensions shared by GCC and Clang, so that the
// same text serves AVX-512, AVX2 and NEON.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
// The same vector at any address.
typedef float vfu __attribute__((vector_size(W * 4), aligned(4), may_alias));

namespace {

// Tiles of 6 rows by 4 vectors need 28 registers, by 2 vectors 14.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kWide = true;
#else
constexpr bool kWide = false;
#endif

inline vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vfu*>(p) = v; }
inline vf splat(float x) { return vf{} + x; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }

// a[0] b[0] a[1] b[1] ... of the lower (upper) halves of a and b.
#if defined(__AVX512F__)
#define LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOWER 0, 4, 1, 5
#define UPPER 2, 6, 3, 7
#endif
inline vf lower(vf a, vf b) { return __builtin_shufflevector(a, b, LOWER); }
inline vf upper(vf a, vf b) { return __builtin_shufflevector(a, b, UPPER); }

// Interleaving row i with row i + W/2, log2(W) times, transposes a W x W block.
inline void transpose_block(vf (&x)[W]) {
  vf y[W];
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = lower(x[i], x[i + W / 2]);
      y[2 * i + 1] = upper(x[i], x[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
}

// v rotated by step lanes, for step = 1, 2, ... W / 2.
template <int step>
inline vf rotate(vf v) {
#if defined(__AVX512F__)
#define AT(i) (((i) + step) % 16)
  return __builtin_shufflevector(v, v, AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), AT(6), AT(7), AT(8), AT(9), AT(10),
                                 AT(11), AT(12), AT(13), AT(14), AT(15));
#elif defined(__AVX__)
#define AT(i) (((i) + step) % 8)
  return __builtin_shufflevector(v, v, AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), AT(6), AT(7));
#else
#define AT(i) (((i) + step) % 4)
  return __builtin_shufflevector(v, v, AT(0), AT(1), AT(2), AT(3));
#endif
#undef AT
}

// Fill every lane of x[r] with the maximum (sum) of its lanes; R rows side by side hide the latency.
template <int R, int step = W / 2>
inline void max_lanes(vf (&x)[R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) x[r] = vmax(x[r], rotate<step>(x[r]));
  if constexpr (step > 1) max_lanes<R, step / 2>(x);
}
template <int R, int step = W / 2>
inline void sum_lanes(vf (&x)[R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) x[r] += rotate<step>(x[r]);
  if constexpr (step > 1) sum_lanes<R, step / 2>(x);
}

// exp(x) for x <= 0 (about 1 ulp), never below exp(-87) = 1.6e-38; NaN stays NaN.
inline vf exp_nonpositive(vf x) {
  const vf lowest = splat(-87.0f);
  x = lowest > x ? lowest : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits.
  const float magic = 12582912.0f;
  const vf shifted = x * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vi exponent = (reinterpret_cast<vi>(shifted) - 0x4B400000 + 127) << 23;
  return p * reinterpret_cast<vf>(exponent);
}

// Per-thread scratch memory that only grows; freed at thread exit.
struct Scratch {
  float* data = nullptr;
  size_t size = 0;
  float* get(size_t n) {
    if (n > size) {
      std::free(data);
      data = nullptr;
      size = 0;
      void* p = nullptr;
      if (posix_memalign(&p, 64, n * sizeof(float)) != 0) throw std::bad_alloc();
      data = static_cast<float*>(p);
      size = n;
    }
    return data;
  }
  ~Scratch() { std::free(data); }
};

// Normal distribution function: Phi(x) = 1/2 + x P(2 (x/5.4)^2 - 1) for |x| <= 5.4, P the
// Chebyshev interpolant of degree 16, highest power first.
constexpr float kPhiRange = 5.4f;
constexpr float kPhi[17] = {
    7.753610919e-05f, -2.005275999e-04f, 1.662022424e-04f, -3.182304941e-04f, 1.107638724e-03f,
    -2.188862115e-03f, 3.576707769e-03f, -5.997510592e-03f, 9.636008078e-03f, -1.423736991e-02f,
    1.966267438e-02f, -2.569302352e-02f, 3.211269782e-02f, -3.921137950e-02f, 4.849985819e-02f,
    -6.532794277e-02f, 1.309281099e-01f};

struct Rows {  // rows of one head: row i starts at base + i * stride
  const float* base;
  int64_t stride;
};

// scores[r][j] = scale * q[r] . k[j], r < R, for V vectors of keys.
// kt holds K transposed: kt[d][j], row length ld.
template <int R, int V>
inline void score_tile(Rows q, const float* kt, int64_t ld, int D, float scale, float* s, int64_t lds) {
  vf acc[R][V] = {};
  for (int d = 0; d < D; ++d) {
    vf k[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) k[v] = load(kt + d * ld + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float x = q.base[r * q.stride + d];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] += k[v] * x;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(s + r * lds + v * W, acc[r][v] * scale);
}

// out[r][:V*W] = inv[r] * sum_j p[r][j] * v[j][:V*W]
template <int R, int V>
inline void value_tile(const float* p, int64_t ldp, Rows value, int64_t n, const vf* inv, float* out, int64_t ldo) {
  vf acc[R][V] = {};
  for (int64_t j = 0; j < n; ++j) {
    vf x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) x[v] = load(value.base + j * value.stride + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float w = p[r * ldp + j];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] += x[v] * w;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(out + r * ldo + v * W, acc[r][v] * inv[r]);
}

// Who sees whom in a sequence: keys up to the query's own position if causal, and nearer than `window`.
struct Rule {
  int64_t window;  // or more than any length
  bool causal;
  int64_t first(int64_t query) const { return query < window ? 0 : query - window + 1; }
  int64_t last(int64_t query, int64_t len) const {  // one beyond
    if (causal && query < len) return query + 1;
    return causal || len - query <= window ? len : query + window;
  }
};

// Queries i, i + 1, ... i + R - 1 of a sequence: softmax(scale * q K^T) V over the keys that each sees.
template <int R>
void query_block(Rows q, const float* kt, int64_t ldk, Rows v, int64_t i, int64_t len, Rule rule, int D, float scale,
                 float* s, float* out, int64_t out_stride) {
  const int64_t begin = rule.first(i) / W * W, end = rule.last(i + R - 1, len), n = end - begin;
  const int64_t ld = (n + W - 1) / W * W;
  kt += begin;
  v.base += begin * v.stride;
  int64_t j = 0;
  if (kWide)
    for (; j + 4 * W <= ld; j += 4 * W) score_tile<R, 4>(q, kt + j, ldk, D, scale, s + j, ld);
  for (; j + 2 * W <= ld; j += 2 * W) score_tile<R, 2>(q, kt + j, ldk, D, scale, s + j, ld);
  for (; j < ld; j += W) score_tile<R, 1>(q, kt + j, ldk, D, scale, s + j, ld);
  int64_t first[R], last[R];
  for (int r = 0; r < R; ++r) {
    first[r] = rule.first(i + r) - begin;
    last[r] = rule.last(i + r, len) - begin;
  }
  const auto hide = [&](float value) {
    for (int r = 0; r < R; ++r) {
      for (int64_t c = 0; c < first[r]; ++c) s[r * ld + c] = value;
      for (int64_t c = last[r]; c < ld; ++c) s[r * ld + c] = value;
    }
  };
  hide(-__builtin_inff());
  vf top[R], sum[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) top[r] = load(s + r * ld);
  for (int64_t c = W; c < ld; c += W)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) top[r] = vmax(top[r], load(s + r * ld + c));
  max_lanes<R>(top);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r] = splat(0.0f);
  for (int64_t c = 0; c < ld; c += W)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf e = exp_nonpositive(load(s + r * ld + c) - top[r]);
      store(s + r * ld + c, e);
      sum[r] += e;
    }
  hide(0.0f);  // what the exponential left there, 1e-38, is nothing beside the sum
  sum_lanes<R>(sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r] = 1.0f / sum[r];
  int d = 0;
  if (kWide)
    for (; d + 4 * W <= D; d += 4 * W)
      value_tile<R, 4>(s, ld, Rows{v.base + d, v.stride}, n, sum, out + d, out_stride);
  for (; d + 2 * W <= D; d += 2 * W) value_tile<R, 2>(s, ld, Rows{v.base + d, v.stride}, n, sum, out + d, out_stride);
  for (; d < D; d += W) value_tile<R, 1>(s, ld, Rows{v.base + d, v.stride}, n, sum, out + d, out_stride);
}

// The keys or values of a sequence: those of its prefix, then its own.
struct Keys {
  Rows prefix, own;
  int64_t shared;  // rows of the prefix
  const float* row(int64_t j) const {
    return j < shared ? prefix.base + j * prefix.stride : own.base + (j - shared) * own.stride;
  }
};

// dst[d][j] = k[j][d]; columns up to the next multiple of W are set to 0.
void transpose(const Keys& k, int64_t len, int D, float* dst, int64_t ld) {
  for (int64_t j = 0; j < len; j += W) {
    const int64_t n = len - j < W ? len - j : W;
    for (int d = 0; d < D; d += W) {
      vf x[W];
      for (int i = 0; i < W; ++i) x[i] = i < n ? load(k.row(j + i) + d) : splat(0.0f);
      transpose_block(x);
      for (int i = 0; i < W; ++i) store(dst + (d + i) * ld + j, x[i]);
    }
  }
}

// What the next head reads, to be fetched into the cache meanwhile.
struct Next {
  const float *q, *k, *v;
};

// `queries` of a sequence of `len` keys, the first of them at the position `at`. The rows of a query do not depend on the
// queries that are computed beside it, nor on whether its keys lie in a prefix.
void one_head(Rows q, int64_t queries, int64_t at, const Keys& k, const Keys& v, Next next, int64_t len, Rule rule, int D,
              float scale, float* out, int64_t out_stride, Scratch& scratch) {
  constexpr int R = 6;
  const int64_t ld = (len + W - 1) / W * W;
  // Rows of V a multiple of 1 KiB apart share few L1 sets: worth a copy once they are read often enough.
  const bool copy_values = v.shared > 0 || (v.own.stride % 256 == 0 && queries >= 64);
  const int64_t ldk = ld + W;  // rows at a power-of-two distance would evict each other from L1
  float* kt = scratch.get(ldk * D + ld * R + (copy_values ? len * D : 0));
  float* s = kt + ldk * D;
  transpose(k, len, D, kt, ldk);
  Rows values = v.own;
  if (copy_values) {
    float* copy = s + ld * R;
    for (int64_t j = 0; j < len; ++j)
      for (int d = 0; d < D; d += W) store(copy + j * D + d, load(v.row(j) + d));
    values = {copy, D};
  }
  int64_t i = 0;
  for (; i + R <= queries; i += R) {
    for (int r = 0; r < R; ++r)
      for (int d = 0; d < D; d += 16) {
        __builtin_prefetch(next.q + (i + r) * q.stride + d);
        __builtin_prefetch(next.k + (i + r) * k.own.stride + d);
        __builtin_prefetch(next.v + (i + r) * v.own.stride + d);
      }
    query_block<R>({q.base + i * q.stride, q.stride}, kt, ldk, values, at + i, len, rule, D, scale, s,
                   out + i * out_stride, out_stride);
  }
  for (; i + 2 <= queries; i += 2)
    query_block<2>({q.base + i * q.stride, q.stride}, kt, ldk, values, at + i, len, rule, D, scale, s,
                   out + i * out_stride, out_stride);
  for (; i < queries; ++i)
    query_block<1>({q.base + i * q.stride, q.stride}, kt, ldk, values, at + i, len, rule, D, scale, s,
                   out + i * out_stride, out_stride);
}

// The rows of a sequence: its queries, the position of the first of them, its prefix, and its own keys.
struct Span {
  int64_t query, queries, at, prefix, shared, own, keys;
};

// cblas_sgemm_compute of MKL.
using Compute = void (*)(int, int, int, int, int, int, const float*, int, const float*, int, float, float*, int);
constexpr int kRowMajor = 101, kNoTranspose = 111, kPacked = 151;

struct Step {
  const float* weight;  // packed for `out` columns and `in` rows
  const float* bias;
  const float* gamma;
  const float* beta;
  int64_t in, out;
  float epsilon;
  int32_t activation;
};

inline vf load(const float* p, int64_t n) {
  if (n >= W) return load(p);
  vf v = {};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}
inline void store(float* p, vf v, int64_t n) {
  if (n >= W)
    store(p, v);
  else
    std::memcpy(p, &v, n * sizeof(float));
}

inline vf sigmoid(vf x) {
  const vf e = exp_nonpositive(x > 0.0f ? -x : x);
  return (x > 0.0f ? splat(1.0f) : e) / (e + 1.0f);
}

// 1 GELU by the normal distribution function, 2 GELU by tanh, 3 SiLU, 4 ReLU.
template <int kind>
inline vf activate(vf x) {
  if constexpr (kind == 1) {
    const vf limit = splat(kPhiRange);
    vf z = x > limit ? limit : x;
    z = z < -limit ? -limit : z;
    const vf u = z * z * (2.0f / (kPhiRange * kPhiRange)) - 1.0f;
    vf p = splat(kPhi[0]);
#pragma GCC unroll 16
    for (int i = 1; i < 17; ++i) p = p * u + kPhi[i];
    return x < -limit ? splat(0.0f) : x * (z * p + 0.5f);
  }
  if constexpr (kind == 2) return x * sigmoid((x + x * x * x * 0.044715f) * 1.5957691216f);
  if constexpr (kind == 3) return x * sigmoid(x);
  if constexpr (kind == 4) return x < 0.0f ? splat(0.0f) : x;
  return x;
}

template <int kind>
void activate_rows(float* y, const float* bias, int64_t rows, int64_t columns) {
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t c = 0; c < columns; c += W) {
      float* at = y + t * columns + c;
      const int64_t n = columns - c;
      const vf x = bias ? load(at, n) + load(bias + c, n) : load(at, n);
      store(at, activate<kind>(x), n);
    }
}

void activate_rows(float* y, const float* bias, int64_t rows, int64_t columns, int activation) {
  if (activation == 1) activate_rows<1>(y, bias, rows, columns);
  if (activation == 2) activate_rows<2>(y, bias, rows, columns);
  if (activation == 3) activate_rows<3>(y, bias, rows, columns);
  if (activation == 4) activate_rows<4>(y, bias, rows, columns);
  if (activation == 0 && bias) activate_rows<0>(y, bias, rows, columns);
}

// row = (row + bias + other - mean) / sqrt(variance + epsilon) * gamma + beta; the variance is taken of the centred row.
void add_norm(float* row, const Step& step, const float* other) {
  const int64_t columns = step.out;
  vf sum[1] = {splat(0.0f)}, squares[1] = {splat(0.0f)};
  for (int64_t c = 0; c < columns; c += W) {
    const int64_t n = columns - c;
    vf x = load(row + c, n) + load(other + c, n);
    if (step.bias) x += load(step.bias + c, n);
    store(row + c, x, n);
    sum[0] += x;
  }
  sum_lanes<1>(sum);
  const vf mean = sum[0] / static_cast<float>(columns);
  for (int64_t c = 0; c < columns; c += W) {
    const int64_t n = columns - c;
    vf x = load(row + c, n) - mean;
    store(row + c, x, n);
    if (n < W) x = load(row + c, n);  // lanes beyond the row count nothing
    squares[0] += x * x;
  }
  sum_lanes<1>(squares);
  const vf scale = splat(1.0f / __builtin_sqrtf(squares[0][0] / static_cast<float>(columns) + step.epsilon));
  for (int64_t c = 0; c < columns; c += W) {
    const int64_t n = columns - c;
    store(row + c, load(row + c, n) * scale * load(step.gamma + c, n) + load(step.beta + c, n), n);
  }
}

// to = row / sqrt(mean of row^2 + epsilon) * gamma
void rms_norm_row(const float* row, const float* gamma, float epsilon, float* to, int64_t columns) {
  vf squares[2] = {splat(0.0f), splat(0.0f)};
  int64_t c = 0;
  for (; c + 2 * W <= columns; c += 2 * W) {
    const vf a = load(row + c), b = load(row + c + W);
    squares[0] += a * a;
    squares[1] += b * b;
  }
  for (; c < columns; c += W) {
    const vf x = load(row + c, columns - c);
    squares[0] += x * x;
  }
  squares[0] += squares[1];
  sum_lanes<2>(squares);
  const vf scale = splat(1.0f / __builtin_sqrtf(squares[0][0] / static_cast<float>(columns) + epsilon));
  for (c = 0; c < columns; c += W) {
    const int64_t n = columns - c;
    store(to + c, load(row + c, n) * scale * load(gamma + c, n), n);
  }
}

}  // namespace

extern "C" {

// Lanes per vector: head sizes must be a multiple of it.
int vector_width() { return W; }

// q: row (head h, token t) at q + h * qh + t * qt, D contiguous floats; k, v alike with
// heads / group heads.  out: (queries, heads, D) contiguous.  A query sees keys up to
// its own position if causal, and nearer than `window` positions (0 = any).
// Returns 0, or 1 when memory ran out (out is then unspecified).
int packed_attention(const float* q, int64_t qh, int64_t qt, const float* k, int64_t kh, int64_t kt, const float* v,
                     int64_t vh, int64_t vt, float* out, const Span* spans, int64_t sequences, int64_t heads,
                     int64_t group, int64_t D, float scale, int causal, int64_t window, int threads) {
  const int64_t work = sequences * heads;
  const int64_t chunk = work < 16 * threads ? 1 : 4;  // few pieces of work are long ones
  const Rule rule{window > 0 ? window : INT64_MAX, causal != 0};
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, chunk)
    for (int64_t w = 0; w < work; ++w) {
      const Span& span = spans[w / heads];
      const int64_t h = w % heads;
      if (span.queries <= 0) continue;
      const auto rows_of = [&](const float* x, int64_t xh, int64_t xt) {
        const float* head = x + h / group * xh;
        return Keys{{head + span.prefix * xt, xt}, {head + span.own * xt, xt}, span.shared};
      };
      const Next next{q + (h + 1) * qh + span.query * qt, k + (h + 1) / group * kh + span.own * kt,
                      v + (h + 1) / group * vh + span.own * vt};
      try {
        one_head({q + h * qh + span.query * qt, qt}, span.queries, span.at, rows_of(k, kh, kt), rows_of(v, vh, vt), next,
                 span.shared + span.keys, rule, static_cast<int>(D), scale, out + (span.query * heads + h) * D, heads * D,
                 scratch);
      } catch (const std::bad_alloc&) {
#pragma omp atomic write
        failed = 1;
      }
    }
  }
  return failed;
}

// out = x / sqrt(mean of x^2 + epsilon) * gamma over contiguous rows.
void rms_norm(const float* x, const float* gamma, float epsilon, float* out, int64_t rows, int64_t columns,
              int threads) {
  const bool many = rows * columns >= 1 << 16;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && many)
  for (int64_t t = 0; t < rows; ++t) rms_norm_row(x + t * columns, gamma, epsilon, out + t * columns, columns);
}

// A chain of Linear layers: rows of x pass every step while they are in the cache.  A step multiplies by a matrix that
// the BLAS has packed, adds a bias (if any), activates (0 = not), or adds the rows of the residual and normalises
// (if gamma).  Scratch memory: `block` rows per thread.  Returns 0, or 1 when memory ran out.
// With `fixed`, every product is one of exactly `block` rows between aligned buffers, the last block filled up with zeros,
// on one thread: the BLAS chooses its way by the shape, so each row is computed in the same way whatever is beside it.
int linear_chain(Compute compute, const Step* steps, int count, const float* x, int64_t x_stride, const float* residual,
                 int64_t residual_stride, float* out, int64_t rows, int64_t block, int threads, int fixed) {
  int64_t widest = 0;
  for (int i = 0; i + !fixed < count; ++i) widest = steps[i].out > widest ? steps[i].out : widest;
  widest = (widest + 15) / 16 * 16;
  const int64_t blocks = (rows + block - 1) / block, into = (steps[0].in + 15) / 16 * 16;
  int failed = 0;
  const auto run = [&](int64_t b) {
    static thread_local Scratch scratch;
    const int64_t begin = fixed ? b * block : rows * b / blocks;
    const int64_t n = fixed ? (rows - begin < block ? rows - begin : block) : rows * (b + 1) / blocks - begin;
    const int64_t m = fixed ? block : n;  // rows that are multiplied
    const float* from = x + begin * x_stride;
    int64_t from_stride = x_stride;
    try {
      float* halves = scratch.get((count + fixed > 2 ? 2 : count - 1 + fixed) * m * widest + (fixed ? m * into : 0));
      if (fixed) {
        float* copy = halves + (count + fixed > 2 ? 2 : count - 1 + fixed) * m * widest;
        for (int64_t t = 0; t < n; ++t)
          std::memcpy(copy + t * into, from + t * x_stride, steps[0].in * sizeof(float));
        std::memset(copy + n * into, 0, (m - n) * into * sizeof(float));
        from = copy;
        from_stride = into;
      }
      for (int i = 0; i < count; ++i) {
        const Step& step = steps[i];
        const bool last = i + 1 == count;
        float* to = last && !fixed ? out + begin * step.out : halves + i % 2 * m * widest;
        compute(kRowMajor, kNoTranspose, kPacked, static_cast<int>(m), static_cast<int>(step.out),
                static_cast<int>(step.in), from, static_cast<int>(from_stride), step.weight,
                static_cast<int>(step.out), 0.0f, to, static_cast<int>(step.out));
        if (step.gamma)
          for (int64_t t = 0; t < n; ++t)
            add_norm(to + t * step.out, step, residual + (begin + t) * residual_stride);
        else
          activate_rows(to, step.bias, n, step.out, step.activation);
        if (last && fixed) std::memcpy(out + begin * step.out, to, n * step.out * sizeof(float));
        from = to;
        from_stride = step.out;
      }
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = 1;
    }
  };
  // A single block leaves the threads to the BLAS; several keep one each, without a barrier between steps. A region of
  // one thread would not do for the former: in it the BLAS's own region is nested, and OpenMP makes new threads for it.
  if (threads > 1 && blocks > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t b = 0; b < blocks; ++b) run(b);
  } else {
    for (int64_t b = 0; b < blocks; ++b) run(b);
  }
  return failed;
}
}
