// Linear layers on x86 in other than plain float32, and what follows them: y = f(x W^T + b), for float32 x and y.
//
//   float32    x and W are sums of three bfloat16, whose products AMX sums in float32: as exact as float32 itself, and
//              faster.  G. Henry, P. Tang, A. Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For
//              Higher-Precision Computations", 2019.  W is split while it is read; of float16 into two, bfloat16 is one.
//   int8       a row of x becomes bytes q of its own range, x ~ low + step * q; W is int8 with a scale per output:
//              y = scale * step * (q . w) + low * sum(w) * scale + b.  Rows know nothing of each other.
//   bfloat16   x is rounded to bfloat16; products are summed in float32.
//   halves     W is float16 or bfloat16 in memory only: it is widened to float32, a few KiB at a time.
//
// Layers run as chains: a thread takes a block of rows through all of them while they are in its cache.  For each, it
// narrows the rows, multiplies 32 columns at a time into a tile, and finishes the tile: bias, activation.  Which
// instructions multiply is an argument, the path.
//
// int8 and bfloat16 weights are laid out in panels of 16 outputs: 64 bytes hold 4 consecutive bytes of each of the 16
// rows of W.  This is what vpmaddubsw, vpdpbusd and AMX all read.  Rows are padded with zeros to 64 bytes, outputs to 32.
// What is split is laid out in blocks of 32 outputs and 32 inputs: for each panel 16 lines of an input i and of i + 16; as
// bfloat16, the two of an output are neighbours.  Halves are in panels of 64 outputs, 128 bytes for each input.
#include "kernels.cpp"  // vectors, activations, LayerNorm

#if defined(__x86_64__) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define CENOTE_VNNI 1
#endif
#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && \
    defined(__AVX512BF16__)
#define CENOTE_AMX 1
#endif

namespace {

enum Layout { kPanels, kTiles, kBlocks };  // of weights: multiplied as they are, widened, or split

constexpr int kColumns = 32, kWideColumns = 64;    // of a tile; of a tile of widened weights
constexpr int kRows = 64;                          // of both
constexpr int kFewestRows = 16, kMostRows = 256;   // of a block; AMX takes 16 at once
constexpr int64_t kLargeWeights = int64_t{8} << 20;  // bytes of weights that are read from memory for every block
constexpr int kSplitRows = 128;                    // of a block of float32 that is split
constexpr int64_t kSplitInputs = 1024, kSplitGroups = 3 * kSplitInputs / 2;  // of it that are multiplied at once
constexpr int kAhead = 8192;                       // bytes of weights that are fetched before they are split
constexpr int kChunk = 64;                         // inputs whose weights are widened at once

inline vf vmin(vf a, vf b) { return a < b ? a : b; }
inline vf from_int(const int32_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_loadu_si512(p));
#else
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#endif
}
inline void store_bytes(uint8_t* p, vf x) {  // of values in [0, 255.5)
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x)));
#else
  const __m256i i = _mm256_cvtps_epi32(x);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#endif
}

// ---- one row, narrowed; returns the bytes of q -------------------------------------------------------------------

// Rows come from beyond L2, a few at a time: fetch 3 KiB ahead, the next rows too.
inline void prefetch(const float* x) {
  for (int i = 0; i < 2 * W; i += 16) __builtin_prefetch(x + 768 + i);
}

// q = round((x - low) / step), low and step so that q spans 0 .. 255.  A row with a value that is not finite gets a
// low that is NaN, and so does its output.
int64_t narrow_int8(const float* x, int64_t size, uint8_t* q, float* low, float* step) {
  vf lo0 = splat(x[0]), lo1 = lo0, hi0 = lo0, hi1 = lo0, bad0 = splat(0.0f), bad1 = bad0;
  const vf zero = splat(0.0f);
  int64_t i = 0;
  for (; i + 2 * W <= size; i += 2 * W) {
    prefetch(x + i);
    const vf a = load(x + i), b = load(x + i + W);
    lo0 = vmin(lo0, a), lo1 = vmin(lo1, b);
    hi0 = vmax(hi0, a), hi1 = vmax(hi1, b);
    bad0 += a * zero, bad1 += b * zero;
  }
  vf highest[2] = {vmax(hi0, hi1), -vmin(lo0, lo1)}, wrong[1] = {bad0 + bad1};
  max_lanes<2>(highest);
  sum_lanes<1>(wrong);
  float hi = highest[0][0], lo = -highest[1][0], bad = wrong[0][0];
  for (int64_t j = i; j < size; ++j) {
    lo = x[j] < lo ? x[j] : lo;
    hi = x[j] > hi ? x[j] : hi;
    bad += x[j] * 0.0f;
  }
  const float range = hi - lo;
  const bool flat = !(range > 1e-30f);
  *low = lo + bad;
  *step = flat ? 0.0f : range * (1.0f / 255.0f);
  const float per_unit = flat ? 0.0f : 255.0f / range;
  const vf lows = splat(lo), scale = splat(per_unit);
  i = 0;
  for (; i + W <= size; i += W) store_bytes(q + i, (load(x + i) - lows) * scale);
  if (i < size) {
    float rest[W] = {};
    uint8_t bytes[W];
    std::memcpy(rest, x + i, (size - i) * sizeof(float));
    store_bytes(bytes, (load(rest) - lows) * scale);
    std::memcpy(q + i, bytes, size - i);
  }
  return size;
}

int64_t keep_float32(const float* x, int64_t size, uint8_t* q, float*, float*) {
  std::memcpy(q, x, 4 * size);
  return 4 * size;
}

#if defined(CENOTE_AMX)
// The bfloat16 nearest to each float32, in its upper half.
inline __m512i upper_half(vf x) {
  const __m512i rounded = _mm512_add_epi32((__m512i)x, _mm512_set1_epi32(0x8000));
  return _mm512_and_si512(rounded, _mm512_set1_epi32(0xffff0000));
}
// Pairs of halves: those of a, and those of b above them.
inline __m512i halves(__m512i a, __m512i b) {
  constexpr int select = 0xea;  // (first & second) | third
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff0000), b, _mm512_srli_epi32(a, 16), select);
}

// 32 inputs become three lines of bfloat16, whose sum they are, each of the pairs (i, i + 16).
int64_t split_float32(const float* x, int64_t size, uint8_t* q, float*, float*) {
  const uint8_t* begin = q;
  float rest[2 * W];
  for (int64_t i = 0; i < size; i += 2 * W, q += 192) {
    const float* at = x + i;
    if (i + 2 * W > size) {
      std::memset(rest, 0, sizeof rest);
      std::memcpy(rest, at, (size - i) * sizeof(float));
      at = rest;
    } else {
      prefetch(at);
    }
    vf a = load(at), b = load(at + W);
    for (int part = 0; part < 2; ++part) {
      const __m512i high_a = upper_half(a), high_b = upper_half(b);
      _mm512_storeu_si512(q + 64 * part, halves(high_a, high_b));
      a -= (vf)high_a, b -= (vf)high_b;
    }
    _mm512_storeu_si512(q + 128, halves((__m512i)a, (__m512i)b));
  }
  return q - begin;
}

// Lines [from, to) of a block of weights become lines of its two or three parts, which have 2 KiB each, the lowest first.
template <int parts>
inline void split_weights(const uint8_t* w, int from, int to, uint8_t* into) {
  constexpr int half = parts == 2 ? 32 : 64;
  w += 2 * half * from, into += 64 * from;
  for (; from < to; ++from, w += 2 * half, into += 64) {
    __builtin_prefetch(w + kAhead, 0, 2);
    if (half == 64) __builtin_prefetch(w + kAhead + 64, 0, 2);
    vf a, b;
    if constexpr (parts == 2) {
      a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
      b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + half)));
    } else {
      a = load(reinterpret_cast<const float*>(w)), b = load(reinterpret_cast<const float*>(w + half));
    }
#pragma GCC unroll 2
    for (int part = parts - 1; part > 0; --part) {
      const __m512i high_a = upper_half(a), high_b = upper_half(b);
      _mm512_storeu_si512(into + 2048 * part, halves(high_a, high_b));
      a -= (vf)high_a, b -= (vf)high_b;
    }
    _mm512_storeu_si512(into, halves((__m512i)a, (__m512i)b));
  }
}

int64_t narrow_bf16(const float* x, int64_t size, uint8_t* q, float*, float*) {
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    prefetch(x + i);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + 2 * i), (__m256i)_mm512_cvtneps_pbh(load(x + i)));
  }
  if (i < size) {
    float rest[W] = {};
    std::memcpy(rest, x + i, (size - i) * sizeof(float));
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh(load(rest));
    std::memcpy(q + 2 * i, &halves, 2 * (size - i));
  }
  return 2 * size;
}
#endif

// ---- products: tile[row][32] = q[row] . w, over `groups` of 4 bytes -----------------------------------------------

struct Product {
  const uint8_t* q;  // rows at distance `stride`
  int64_t stride, groups;
  const uint8_t* w;  // two panels at distance 64 * groups
  int32_t* tile;     // int32, or float32 for bfloat16
  int parts;         // of w, if it is split
  uint8_t* split;    // room for them: those of all blocks, or of two by turns, if no other rows need them
  bool once;

  // The parts of a block.
  inline uint8_t* block(int64_t b) const { return split + (once ? b % 2 : b) * 2048 * parts; }
  inline int32_t group(int row, int64_t g) const {
    int32_t x;
    std::memcpy(&x, q + row * stride + 4 * g, 4);
    return x;
  }
  inline Product from(int row) const {
    return {q + row * stride, stride, groups, w, tile + row * kColumns, parts, split, once};
  }
};

struct Avx2 {  // w is such that the sum of two products fits 16 bits
  typedef __m256i vector;
  static constexpr int kAtOnce = 4;
  static inline vector dot(vector sum, vector q, vector w) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(q, w), _mm256_set1_epi16(1)));
  }
};
#if defined(CENOTE_VNNI)
struct AvxVnni {
  typedef __m256i vector;
  static constexpr int kAtOnce = 6;
  static inline vector dot(vector sum, vector q, vector w) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, q, w);
#else
    return _mm256_dpbusd_epi32(sum, q, w);
#endif
  }
};
#endif
#if defined(__AVX512VNNI__)
struct Avx512Vnni {
  typedef __m512i vector;
  static constexpr int kAtOnce = 8;
  static inline vector dot(vector sum, vector q, vector w) { return _mm512_dpbusd_epi32(sum, q, w); }
};
#endif

inline void fill(__m256i& x, int32_t value) { x = _mm256_set1_epi32(value); }
#if defined(__AVX512F__)
inline void fill(__m512i& x, int32_t value) { x = _mm512_set1_epi32(value); }
#endif

// R rows by two vectors, which are a whole 64 bytes of a panel (256 bits) or the same 64 bytes of both panels.
template <class Isa, int R>
inline void multiply_rows(const Product& p) {
  typedef typename Isa::vector V;
  constexpr int lanes = sizeof(V) / 4;
  constexpr bool whole = sizeof(V) == 64;
  for (int column = 0; column < kColumns; column += 2 * lanes) {
    const uint8_t* w0 = p.w + (whole ? 0 : column / 16 * 64 * p.groups);
    const uint8_t* w1 = whole ? w0 + 64 * p.groups : w0 + 32;
    V sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) fill(sums[r][0], 0), fill(sums[r][1], 0);
    for (int64_t g = 0; g < p.groups; ++g) {
      V a, b, q;
      std::memcpy(&a, w0 + 64 * g, sizeof(V));
      std::memcpy(&b, w1 + 64 * g, sizeof(V));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        fill(q, p.group(r, g));
        sums[r][0] = Isa::dot(sums[r][0], q, a);
        sums[r][1] = Isa::dot(sums[r][1], q, b);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      std::memcpy(p.tile + r * kColumns + column, &sums[r][0], sizeof(V));
      std::memcpy(p.tile + r * kColumns + column + lanes, &sums[r][1], sizeof(V));
    }
  }
}

template <class Isa>
void multiply(const Product& p, int rows, bool) {
  int r = 0;
  for (; r + Isa::kAtOnce <= rows; r += Isa::kAtOnce) multiply_rows<Isa, Isa::kAtOnce>(p.from(r));
  if (Isa::kAtOnce > 4)
    for (; r + 4 <= rows; r += 4) multiply_rows<Isa, 4>(p.from(r));
  for (; r < rows; ++r) multiply_rows<Isa, 1>(p.from(r));
}

#if defined(CENOTE_AMX)
// Tiles of 16 rows of 64 bytes: 0 - 3 sums, 4 and 5 rows of q, 6 and 7 panels.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <bool kInt8>
void multiply_tiles(const Product& p, int rows, bool) {
#define DOT(c, a, b)          \
  if constexpr (kInt8)        \
    _tile_dpbusd(c, a, b);    \
  else                        \
    _tile_dpbf16ps(c, a, b);
  const uint8_t* w1 = p.w + 64 * p.groups;
  for (int r = 0; r < rows; r += 32) {
    const uint8_t *q0 = p.q + r * p.stride, *q1 = q0 + 16 * p.stride;
    const bool two = r + 16 < rows;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t g = 0; g < p.groups; g += 16) {
      _tile_loadd(6, p.w + 64 * g, 64);
      _tile_loadd(7, w1 + 64 * g, 64);
      _tile_loadd(4, q0 + 4 * g, p.stride);
      DOT(0, 4, 6)
      DOT(1, 4, 7)
      if (two) {
        _tile_loadd(5, q1 + 4 * g, p.stride);
        DOT(2, 5, 6)
        DOT(3, 5, 7)
      }
    }
    constexpr int64_t row = sizeof(int32_t) * kColumns;
    _tile_stored(0, p.tile + r * kColumns, row);
    _tile_stored(1, p.tile + r * kColumns + 16, row);
    if (two) {
      _tile_stored(2, p.tile + (r + 16) * kColumns, row);
      _tile_stored(3, p.tile + (r + 16) * kColumns + 16, row);
    }
  }
#undef DOT
}

// float32 as sums of bfloat16: of the products of parts those that matter are summed, small ones first; the others are
// below 2^-25 of the whole.  A tile is loaded while the one before it is multiplied, and with `splits`, the next block of
// weights is split meanwhile.
template <int parts, bool two, bool splits>
inline void multiply_split_rows(const Product& p, int row) {
#define ROWS(tile, part) _tile_loadd(tile, a0 + (tile - 4) * 16 * p.stride + 64 * part, p.stride);
#define PANEL(tile, part) _tile_loadd(tile, w + 1024 * (2 * (parts - 1 - part) + tile - 6), 64);
#define DOT(c, a, b) _tile_dpbf16ps(c, a, b);
#define BOTH(x) \
  if constexpr (two) { x }
#define AHEAD(turn) \
  if constexpr (splits) \
    if (more) split_weights<parts>(next, 8 * turn, 8 * turn + 8, into);
#define FIRST(row, panel) ROWS(4, row) PANEL(6, panel) BOTH(ROWS(5, row)) PANEL(7, panel)
#define THEN_ROWS(next) DOT(0, 4, 6) DOT(1, 4, 7) ROWS(4, next) BOTH(DOT(2, 5, 6) DOT(3, 5, 7) ROWS(5, next))
#define THEN_PANELS(next) \
  DOT(0, 4, 6) BOTH(DOT(2, 5, 6)) PANEL(6, next) DOT(1, 4, 7) BOTH(DOT(3, 5, 7)) PANEL(7, next)
#define LAST DOT(0, 4, 6) DOT(1, 4, 7) BOTH(DOT(2, 5, 6) DOT(3, 5, 7))
  constexpr int64_t size = 2048 * parts, stored = parts == 3 ? 4096 : 2048;
  const uint8_t* a0 = p.q + row * p.stride;
  const int64_t blocks = p.groups / 48;
  const uint8_t* next = p.w;
  if constexpr (splits) split_weights<parts>(next, 0, 32, p.block(0));
  _tile_zero(0);
  _tile_zero(1);
  BOTH(_tile_zero(2); _tile_zero(3);)
  for (int64_t b = 0; b < blocks; ++b, a0 += 192) {
    const uint8_t* w = parts == 1 ? p.w + b * size : p.block(b);
    [[maybe_unused]] const bool more = b + 1 < blocks;
    [[maybe_unused]] uint8_t* into = p.block(b + 1);
    next += stored;
    if constexpr (parts == 3) {
      FIRST(0, 2) AHEAD(0) THEN_PANELS(1) AHEAD(1) THEN_ROWS(1) AHEAD(2) THEN_PANELS(0) AHEAD(3)
      THEN_ROWS(2) THEN_ROWS(0) LAST
    } else if constexpr (parts == 2) {
      FIRST(0, 1) AHEAD(0) THEN_ROWS(1) AHEAD(1) THEN_PANELS(0) AHEAD(2) THEN_ROWS(2) AHEAD(3) THEN_ROWS(0) LAST
    } else {
      FIRST(2, 0) THEN_ROWS(1) THEN_ROWS(0) LAST
    }
  }
  constexpr int64_t line = sizeof(float) * kColumns;
  float* to = reinterpret_cast<float*>(p.tile) + row * kColumns;
  _tile_stored(0, to, line);
  _tile_stored(1, to + 16, line);
  BOTH(_tile_stored(2, to + 16 * kColumns, line); _tile_stored(3, to + 16 * kColumns + 16, line);)
#undef LAST
#undef THEN_PANELS
#undef THEN_ROWS
#undef FIRST
#undef AHEAD
#undef BOTH
#undef DOT
#undef PANEL
#undef ROWS
}

// `begins`: these are the first rows that meet the tile's weights, which are split for all.
template <int parts>
void multiply_split(const Product& p, int rows, bool begins) {
  int r = 0;
  if (begins && parts > 1) {
    constexpr bool splits = parts > 1;
    rows > 16 ? multiply_split_rows<parts, true, splits>(p, 0) : multiply_split_rows<parts, false, splits>(p, 0);
    r = 32;
  }
  for (; r + 16 < rows; r += 32) multiply_split_rows<parts, true, false>(p, r);
  if (r < rows) multiply_split_rows<parts, false, false>(p, r);
}

void multiply_parts(const Product& p, int rows, bool begins) {
  if (p.parts == 3) return multiply_split<3>(p, rows, begins);
  return p.parts == 2 ? multiply_split<2>(p, rows, begins) : multiply_split<1>(p, rows, begins);
}
#endif

// ---- halves: tile[row][64] = x[row] . w -----------------------------------------------------------------------------

template <bool kFloat16>
inline vf widen(const uint16_t* w) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  if constexpr (kFloat16) return _mm512_cvtph_ps(halves);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
  if constexpr (kFloat16) return _mm256_cvtph_ps(halves);
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#endif
}

// Adds the products of `count` inputs to R rows of V vectors of the tile, or begins with them.
template <int R, int V>
inline void multiply_wide_rows(Rows x, const float (*w)[kWideColumns], int count, float* tile, bool begin) {
  vf sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = begin ? splat(0.0f) : load(tile + r * kWideColumns + v * W);
  for (int i = 0; i < count; ++i) {
    vf weights[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) weights[v] = load(w[i] + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float one = x.base[r * x.stride + i];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] += weights[v] * one;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(tile + r * kWideColumns + v * W, sums[r][v]);
}

template <bool kFloat16>
void multiply_halves(const Product& p, int rows, bool) {
  constexpr int V = kWide ? 4 : 2;  // 6 rows by 4 vectors need 29 registers, by 2 vectors 15
  const Rows x{reinterpret_cast<const float*>(p.q), p.stride / 4};
  const uint16_t* w = reinterpret_cast<const uint16_t*>(p.w);
  float* tile = reinterpret_cast<float*>(p.tile);
  const int64_t size = p.groups;  // a group is an input here
  alignas(64) float wide[kChunk][kWideColumns];
  for (int64_t first = 0; first < size; first += kChunk) {
    const int count = static_cast<int>(size - first < kChunk ? size - first : kChunk);
    for (int i = 0; i < count; ++i)
      for (int c = 0; c < kWideColumns; c += W) store(wide[i] + c, widen<kFloat16>(w + (first + i) * kWideColumns + c));
    for (int c = 0; c < kWideColumns; c += V * W) {
      auto chunk = reinterpret_cast<const float(*)[kWideColumns]>(wide[0] + c);
      int r = 0;
      for (; r + 6 <= rows; r += 6)
        multiply_wide_rows<6, V>({x.base + r * x.stride + first, x.stride}, chunk, count, tile + r * kWideColumns + c,
                                 first == 0);
      for (; r + 2 <= rows; r += 2)
        multiply_wide_rows<2, V>({x.base + r * x.stride + first, x.stride}, chunk, count, tile + r * kWideColumns + c,
                                 first == 0);
      for (; r < rows; ++r)
        multiply_wide_rows<1, V>({x.base + r * x.stride + first, x.stride}, chunk, count, tile + r * kWideColumns + c,
                                 first == 0);
    }
  }
}

// ---- paths -----------------------------------------------------------------------------------------------------------

// Products by one set of instructions, under its name in linear.py.
struct Path {
  const char* name;
  Layout layout;
  bool amx;
  // Narrows a row of x into q; of int8 with its range.  Returns the bytes of q.
  int64_t (*narrow)(const float* x, int64_t size, uint8_t* q, float* low, float* step);
  // `begins`: these are the first rows that meet the tile's weights.
  void (*multiply)(const Product& p, int rows, bool begins);

  bool splits() const { return layout == kBlocks; }
  int columns() const { return layout == kTiles ? kWideColumns : kColumns; }
  int64_t inputs_at_once(int64_t in) const { return splits() ? kSplitInputs : in; }
  // Bytes of a tile of weights up to a number of groups; `parts` as in `NarrowStep`.
  int64_t weights(int64_t groups, int parts) const {
    const int64_t bytes = splits() ? groups / 3 * (parts == 3 ? 8 : 4) : layout == kTiles ? groups * 2 : groups * 4;
    return bytes * columns();
  }
};

// A new path is a row here and one of `PATHS` in linear.py.
const Path kPaths[] = {
    {"AVX2", kPanels, false, narrow_int8, multiply<Avx2>},
    {"float16", kTiles, false, keep_float32, multiply_halves<true>},
    {"bfloat16", kTiles, false, keep_float32, multiply_halves<false>},
#if defined(CENOTE_VNNI)
    {"AVX-VNNI", kPanels, false, narrow_int8, multiply<AvxVnni>},
#endif
#if defined(__AVX512VNNI__)
    {"AVX512-VNNI", kPanels, false, narrow_int8, multiply<Avx512Vnni>},
#endif
#if defined(CENOTE_AMX)
    {"AMX", kPanels, true, narrow_int8, multiply_tiles<true>},
    {"AMX-BF16", kPanels, true, narrow_bf16, multiply_tiles<false>},
    {"AMX-FLOAT32", kBlocks, true, split_float32, multiply_parts},
    {"AMX-FLOAT16", kBlocks, true, split_float32, multiply_parts},
#endif
};
constexpr int kPathCount = sizeof kPaths / sizeof kPaths[0];

// ---- a chain of layers -----------------------------------------------------------------------------------------------

struct NarrowStep {
  const void* weight;
  const float* scale;  // with `sums`: of int8.  These and the bias are padded to 64 outputs
  const float* sums;
  const float* bias;
  const float* gamma;
  const float* beta;
  int64_t in, out;
  int64_t groups;  // of 4 bytes of a padded row of x, as it is multiplied
  float epsilon;
  int32_t activation;
  int32_t path;   // its number, the same in all steps
  int32_t parts;  // of what is split: the bfloat16 that each weight is a sum of, which tells float32 from halves
};

// What one thread needs for a block.
struct Work {
  uint8_t* q;
  uint8_t* parts;  // of a tile of weights
  int64_t stride;
  float low[kMostRows + kFewestRows], step[kMostRows + kFewestRows];
  alignas(64) int32_t tile[kRows * kWideColumns];
};

// A share of the inputs of a step; the first begins the sums, the last ends them.
struct Share {
  int64_t begin, size, groups;
  bool first, last;
};

template <int activation>
void finish(const NarrowStep& s, const Share& share, const Work& work, int columns, int first, int rows, int64_t column,
            float* y) {
  const int64_t wanted = s.out - column < columns ? s.out - column : columns;
  for (int r = 0; r < rows; ++r)
    for (int64_t c = 0; c < wanted; c += W) {
      const int32_t* sums = work.tile + r * columns + c;
      float* to = y + (first + r) * s.out + column + c;
      vf v;
      const vf bias = load(s.bias + column + c);
      if (s.scale) {
        const vf rest = load(s.sums + column + c) * work.low[first + r] + bias;
        v = from_int(sums) * (load(s.scale + column + c) * work.step[first + r]) + rest;
      } else {
        v = load(reinterpret_cast<const float*>(sums)) + (share.first ? bias : load(to, wanted - c));
      }
      store(to, activate<activation>(v), wanted - c);
    }
}

void finish(const NarrowStep& s, const Share& share, const Work& work, int columns, int first, int rows, int64_t column,
            float* y) {
  switch (share.last ? s.activation : 0) {
    case 1: return finish<1>(s, share, work, columns, first, rows, column, y);
    case 2: return finish<2>(s, share, work, columns, first, rows, column, y);
    case 3: return finish<3>(s, share, work, columns, first, rows, column, y);
    case 4: return finish<4>(s, share, work, columns, first, rows, column, y);
    default: return finish<0>(s, share, work, columns, first, rows, column, y);
  }
}

// Rows of x, as the path multiplies them, into work.q.
void narrow_rows(const Path& path, Rows x, int rows, const Share& share, Work& work) {
  for (int r = 0; r < rows; ++r) {
    uint8_t* row = work.q + r * work.stride;
    const float* from = x.base + r * x.stride + share.begin;
    const int64_t used = path.narrow(from, share.size, row, work.low + r, work.step + r);
    std::memset(row + used, 0, 4 * share.groups - used);
  }
}

// Columns of the tiles [from, to) of a step over a block of rows, into y, whose rows are contiguous.
void run_step(const Path& path, const NarrowStep& s, Rows x, int rows, int64_t from, int64_t to, Work& work, float* y) {
  const int columns = path.columns();
  const uint8_t* w = static_cast<const uint8_t*>(s.weight);
  const int64_t at_once = path.inputs_at_once(s.in);
  for (int64_t begin = 0, groups = 0; begin < s.in; begin += at_once) {
    const bool last = begin + at_once >= s.in;
    const Share share{begin, last ? s.in - begin : at_once, last ? s.groups - groups : kSplitGroups, begin == 0, last};
    narrow_rows(path, x, rows, share, work);
    for (int64_t t = from; t < to; ++t) {
      const uint8_t* at = w + t * path.weights(s.groups, s.parts) + path.weights(groups, s.parts);
      for (int first = 0; first < rows; first += kRows) {
        const int n = rows - first < kRows ? rows - first : kRows;
        for (int r = 0; r < n; ++r)  // or each row's stores would wait for memory in turn
          for (int c = 0; c < columns; c += 16) __builtin_prefetch(y + (first + r) * s.out + t * columns + c, 1);
        const uint8_t* q = work.q + first * work.stride;
        path.multiply({q, work.stride, share.groups, at, work.tile, s.parts, work.parts, rows <= 32}, n, first == 0);
        finish(s, share, work, columns, first, n, t * columns, y);
      }
    }
    groups += share.groups;
  }
}

struct Chain {
  const Path& path;
  const NarrowStep* steps;
  int count;
  Rows x, residual;
  float* out;
  int64_t rows, blocks;

  // Blocks are as even as whole tiles of rows let them be.
  int64_t begin(int64_t b) const {
    return b == blocks ? rows : rows * b / blocks / kFewestRows * kFewestRows;
  }
  int64_t longest() const { return (rows / blocks / kFewestRows + 2) * kFewestRows; }

  // Bytes of a thread's scratch memory, and of what threads share that run a block together.
  int64_t stride() const {
    int64_t groups = 0;
    for (int i = 0; i < count; ++i) groups = steps[i].groups > groups ? steps[i].groups : groups;
    if (path.splits() && groups > kSplitGroups) groups = kSplitGroups;
    return 4 * groups + 64;  // rows at a power-of-two distance would evict each other from L1
  }
  int64_t between() const {
    int64_t widest = 0;
    for (int i = 0; i + 1 < count; ++i) widest = steps[i].out > widest ? steps[i].out : widest;
    return widest * longest();
  }

  // The share `part` of `parts` in a block of rows; `wait` is called where all must have come so far.
  template <class Wait>
  void run(int64_t b, float* halves, Work& work, int part, int parts, Wait wait) const {
    const int64_t first = begin(b);
    const int n = static_cast<int>(begin(b + 1) - first);
    Rows from{x.base + first * x.stride, x.stride};
    for (int i = 0; i < count; ++i) {
      const NarrowStep& s = steps[i];
      float* to = i + 1 == count ? out + first * s.out : halves + i % 2 * between();
      const int64_t columns = path.columns(), tiles = (s.out + columns - 1) / columns;
      run_step(path, s, from, n, tiles * part / parts, tiles * (part + 1) / parts, work, to);
      wait();
      if (s.gamma)
        for (int r = part; r < n; r += parts)
          add_norm(to + r * s.out, {nullptr, nullptr, s.gamma, s.beta, s.in, s.out, s.epsilon, 0},
                   residual.base + (first + r) * residual.stride);
      from = {to, s.out};
    }
  }
};

bool may_use_amx() {
#if defined(CENOTE_AMX)
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, once per process
  static const bool granted = syscall(SYS_arch_prctl, request, tile_data) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace

extern "C" {

// The name of path `number`: empty where the system does not allow it, null where there is no such number.
const char* linear_path(int number) {
  if (number >= kPathCount) return nullptr;
  return kPaths[number].amx && !may_use_amx() ? "" : kPaths[number].name;
}

// A chain of Linear layers: rows of x pass every step.  A step multiplies, adds its bias, activates (0 = not), or adds
// the rows of the residual and normalises (if gamma).  Returns 0, or 1 when memory ran out.
int narrow_chain(const NarrowStep* steps, int count, const float* x, int64_t x_stride, const float* residual,
                 int64_t residual_stride, float* out, int64_t rows, int threads) {
  const Path& path = kPaths[steps[0].path];
  int64_t block = path.splits() ? kSplitRows : kRows;
  for (int i = 0; i < count; ++i)
    if (path.layout == kPanels && 4 * steps[i].groups * steps[i].out > kLargeWeights) block = kMostRows;
#if defined(_OPENMP)
  // Too few rows to give every thread some of its own: all run each block together.
  const bool together = threads > 1 && rows < kFewestRows * threads;
#else
  const bool together = false;
  threads = 1;
#endif
  const int64_t parallel = together ? 1 : threads, turns = (rows + block * parallel - 1) / (block * parallel);
  const Chain chain{path, steps, count, {x, x_stride}, {residual, residual_stride}, out, rows, turns * parallel};
  const int64_t between = (count > 1 ? 2 : 0) * chain.between();
  float* shared = nullptr;
  Scratch common;
  int failed = 0;
  try {
    if (together) shared = common.get(between);
  } catch (const std::bad_alloc&) {
    return 1;
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch scratch;
#if defined(CENOTE_AMX)
    const TileConfig config;
    if (path.amx) _tile_loadconfig(&config);
#endif
    Work work;
    work.stride = chain.stride();
    const int64_t parts = path.splits() ? 6144 / 32 * kSplitInputs : 0;  // bytes
    float* own = nullptr;
    try {
      own = scratch.get(between + (chain.longest() * work.stride + parts) / 4);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp barrier
    if (!failed) {
      work.parts = reinterpret_cast<uint8_t*>(own + between);
      work.q = work.parts + parts;
#if defined(_OPENMP)
      if (together) {
        for (int64_t b = 0; b < chain.blocks; ++b)
          chain.run(b, shared, work, omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
          });
      } else
#endif
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = 0; b < chain.blocks; ++b) chain.run(b, own, work, 0, 1, [] {});
    }
#if defined(CENOTE_AMX)
    if (path.amx) _tile_release();
#endif
  }
  return failed;
}
}

#else  // no vector instructions that this file is written for

extern "C" {
const char* linear_path(int) { return nullptr; }
int narrow_chain(const void*, int, const float*, int64_t, const float*, int64_t, float*, int64_t, int) { return 1; }
}
#endif
