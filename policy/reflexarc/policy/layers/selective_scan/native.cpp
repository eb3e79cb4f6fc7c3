// The selective scan and the causal convolution of Mamba on a CPU, forward and backward.
//
// Built on the machine where it runs (native_build.py) and called through ctypes: it includes no
// header of torch or Python, so that it compiles in seconds and fits every version of both.
//
// A vector holds one step of `lanes` neighbouring channels. A task is one row of the batch and one
// group of channels; groups depend on the shape alone, so that results do not depend on the number
// of threads. Layouts are (batch, length, channels) with unit stride in the last dimension.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

namespace {

template <class T> struct Simd {
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int lanes = VECTOR_BYTES / sizeof(T);
};
template <class T> using Vec = typename Simd<T>::Vector;

// Channel groups of the backward pass: their sums over channels are added up afterwards.
constexpr int64_t kBlocksInGroup = 8;

template <class T> Vec<T> splat(T value) { return Vec<T>{} + value; }

template <class T> Vec<T> load(const T *from, int64_t count) {
  Vec<T> v{};
  if (count >= Simd<T>::lanes) std::memcpy(&v, from, sizeof v);
  else std::memcpy(&v, from, count * sizeof(T));
  return v;
}

template <class T> void store(T *to, const Vec<T> &v, int64_t count) {
  if (count >= Simd<T>::lanes) std::memcpy(to, &v, sizeof v);
  else std::memcpy(to, &v, count * sizeof(T));
}

template <class T> T sum_of_lanes(const Vec<T> &v) {
  T part[Simd<T>::lanes];
  std::memcpy(part, &v, sizeof v);
  for (int half = Simd<T>::lanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

#if defined(__AVX512F__)
template <> inline float sum_of_lanes<float>(const Vec<float> &v) {  // in the same order
  return _mm512_reduce_add_ps((__m512)v);
}
#endif

// ---- elementary functions ------------------------------------------------------------------

// A NaN passes the clamp. Compilers make two operations of the comparison, and clamps are a tenth of
// a scan.
inline Vec<float> at_least(float low, const Vec<float> &x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)splat(low), (__m512)x);
#elif defined(__AVX__)
  return (Vec<float>)_mm256_max_ps((__m256)splat(low), (__m256)x);
#else
  return x < low ? splat(low) : x;
#endif
}

inline Vec<float> at_most(float high, const Vec<float> &x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)splat(high), (__m512)x);
#elif defined(__AVX__)
  return (Vec<float>)_mm256_min_ps((__m256)splat(high), (__m256)x);
#else
  return x > high ? splat(high) : x;
#endif
}

// Polynomials of Cephes' expf and logf: about one unit in the last place. A cast between vectors
// keeps the bits. Arguments below -86 give exp(-86) = 4e-38, those above 88 exp(88).
inline Vec<float> exponential(Vec<float> x) {
  typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
  x = at_most(88.0f, at_least(-86.0f, x));
  const float round_to_integer = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the integer
  Vec<float> shifted = x * 1.44269504088896341f + round_to_integer;
  Vec<float> n = shifted - round_to_integer;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Int exponent = (Int)shifted << 23;
  Int bits = (Int)p + exponent;
  Vec<float> result = (Vec<float>)bits;
  return x == x ? result : x;
}

// 2^x for the decays, of which there are as many as steps, channels and states together: a shorter
// polynomial, within two units in the last place, and exact towards x = 0, so that slow decays do
// not drift. Beyond 2^-125 and 2^127 it saturates; a NaN with a payload in its low bits may get lost.
inline Vec<float> power_of_two(Vec<float> x) {
  typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
  x = at_most(127.0f, at_least(-125.0f, x));
  const float round_to_integer = 12582912.0f;
  Vec<float> shifted = x + round_to_integer;
  Vec<float> f = x - (shifted - round_to_integer);
  Vec<float> p = splat(1.3264727214e-3f);
  p = p * f + 9.6715128125e-3f;
  p = p * f + 5.5507337448e-2f;
  p = p * f + 2.4022242083e-1f;
  p = p * f + 6.9314697760e-1f;
  p = p * f + 1.0f;
  return (Vec<float>)((Int)p + ((Int)shifted << 23));
}

inline Vec<float> logarithm(Vec<float> x) {  // of normal positive numbers
  typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
  Int bits = (Int)x;
  Int mantissa_bits = (bits & 0x007fffff) | 0x3f800000;
  Vec<float> m = (Vec<float>)mantissa_bits;
  Vec<float> e = __builtin_convertvector((bits >> 23) - 127, Vec<float>);
  e = m > 1.41421356f ? e + 1.0f : e;
  m = m > 1.41421356f ? m * 0.5f : m;
  Vec<float> f = m - 1.0f, z = f * f;
  Vec<float> p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  Vec<float> y = f * z * p + e * -2.12194440e-4f - 0.5f * z + f;
  return y + e * 0.693359375f;
}

inline Vec<float> softplus(Vec<float> x) {  // log(1 + exp(x)), exact for small exp(x) as well
  Vec<float> e = exponential(at_most(20.0f, x)), u = e + 1.0f;
  Vec<float> y = logarithm(u) + (e - (u - 1.0f)) / u;
  y = x > 20.0f ? x : y;
  return x == x ? y : x;
}

// Double precision serves gradient checks: one lane after the other, by the standard library.
inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = std::exp(x[i]);
  return x;
}

inline Vec<double> power_of_two(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = std::exp2(x[i]);
  return x;
}

inline Vec<double> softplus(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i)
    x[i] = x[i] > 20.0 ? x[i] : std::log1p(std::exp(x[i]));
  return x;
}

constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

template <class V> V sigmoid(V x) { return 1 / (1 + exponential(-x)); }

// ---- arguments, as native.py lays them out -------------------------------------------------

template <class T> struct Rows {  // (batch, length, width), unit stride in width
  T *data;
  int64_t batch_stride, step_stride;
  T *at(int64_t b, int64_t t) const { return data + b * batch_stride + t * step_stride; }
};

template <class T> struct Scan {
  int64_t batch, length, channels, state, chunk, threads, softplus;
  Rows<const T> u, delta, B, C, gate;  // gate.data may be null
  const T *A;                          // (state, channels)
  const T *D;                          // (channels), or null
  Rows<T> y;
  T *checkpoints;  // (batch, blocks, chunks - 1, state, lanes), or null
  Rows<const T> grad_y;
  Rows<T> grad_u, grad_delta, grad_gate;
  T *grad_B, *grad_C;  // (groups, batch, length, state)
  T *grad_A;           // (batch, state, channels)
  T *grad_D;           // (batch, channels)
};

template <class T> struct Convolution {
  int64_t batch, length, channels, taps, threads;
  Rows<const T> x;
  const T *weight;  // (taps, channels)
  const T *bias;    // (channels)
  Rows<T> y;
  Rows<const T> grad_y;
  Rows<T> grad_x;
  T *grad_weight;  // (batch, taps, channels)
  T *grad_bias;    // (batch, channels)
};

// ---- the scan ------------------------------------------------------------------------------

template <class T> struct Block {  // `lanes` channels of one row
  int64_t b, first, count;
  Block(int64_t channels, int64_t row, int64_t index)
      : b(row), first(index * Simd<T>::lanes), count(channels - first) {}
};

template <class T> int64_t blocks_of(int64_t channels) {
  return (channels + Simd<T>::lanes - 1) / Simd<T>::lanes;
}

template <class T> T *checkpoint(const Scan<T> &s, int64_t b, int64_t block, int64_t chunk) {
  const int64_t chunks = (s.length + s.chunk - 1) / s.chunk;
  const int64_t place = (b * blocks_of<T>(s.channels) + block) * (chunks - 1) + chunk - 1;
  return s.checkpoints + place * s.state * Simd<T>::lanes;
}

template <class T> Vec<T> step_size(const Scan<T> &s, const Block<T> &k, int64_t t) {
  Vec<T> raw = load(s.delta.at(k.b, t) + k.first, k.count);
  return s.softplus ? softplus(raw) : raw;
}

// A in units of powers of two, which saves a product at every decay.
template <class T> void load_decays(const Scan<T> &s, const Block<T> &k, Vec<T> *A) {
  for (int64_t n = 0; n < s.state; ++n)
    A[n] = load(s.A + n * s.channels + k.first, k.count) * T(kLog2E);
}

template <class T> void forward_block(const Scan<T> &s, int64_t b, int64_t index) {
  using V = Vec<T>;
  const Block<T> k(s.channels, b, index);
  const int64_t N = s.state;
  std::vector<V> A(N), h(N, V{});
  load_decays(s, k, A.data());
  const V D = s.D ? load(s.D + k.first, k.count) : V{};
  for (int64_t t = 0; t < s.length; ++t) {
    if (s.checkpoints && t && t % s.chunk == 0)
      std::memcpy(checkpoint(s, b, index, t / s.chunk), h.data(), N * sizeof(V));
    const V d = step_size(s, k, t), x = load(s.u.at(b, t) + k.first, k.count), du = d * x;
    const T *B = s.B.at(b, t), *C = s.C.at(b, t);
    V y = D * x;
    for (int64_t n = 0; n < N; ++n) {
      h[n] = power_of_two(d * A[n]) * h[n] + du * B[n];
      y += h[n] * C[n];
    }
    if (s.gate.data) {
      const V z = load(s.gate.at(b, t) + k.first, k.count);
      y *= z * sigmoid(z);
    }
    store(s.y.at(b, t) + k.first, y, k.count);
  }
}

// One row and one group of channels, chunks from last to first: the states of a chunk are computed
// anew from the one before it, then the gradient runs back through them.
template <class T> struct BackwardTask {
  using V = Vec<T>;
  const Scan<T> &s;
  const int64_t b, group, first_block, blocks, N;
  // Of one chunk and block: step sizes, decays, and states with the one before the chunk in front.
  std::vector<V> step, decay, states;
  // Of one chunk, summed over the group's blocks.
  std::vector<V> sum_B, sum_C;
  // Of the group's blocks.
  std::vector<V> A, from_later, sum_A, sum_D;

  BackwardTask(const Scan<T> &scan, int64_t row, int64_t group_index)
      : s(scan), b(row), group(group_index), first_block(group_index * kBlocksInGroup),
        blocks(std::min(kBlocksInGroup, blocks_of<T>(scan.channels) - first_block)), N(scan.state),
        step(s.chunk), decay(s.chunk * N), states((s.chunk + 1) * N), sum_B(s.chunk * N),
        sum_C(s.chunk * N),
        A(blocks * N), from_later(blocks * N, V{}), sum_A(blocks * N, V{}), sum_D(blocks, V{}) {}

  void run() {
    for (int64_t i = 0; i < blocks; ++i)
      load_decays(s, Block<T>(s.channels, b, first_block + i), &A[i * N]);
    for (int64_t chunk = (s.length - 1) / s.chunk; chunk >= 0; --chunk) {
      const int64_t begin = chunk * s.chunk, end = std::min(s.length, begin + s.chunk);
      std::fill(sum_B.begin(), sum_B.end(), V{});
      std::fill(sum_C.begin(), sum_C.end(), V{});
      for (int64_t i = 0; i < blocks; ++i) {
        recompute(i, chunk, begin, end);
        for (int64_t t = end - 1; t >= begin; --t) back_through_step(i, t, t - begin);
      }
      write_sums(begin, end);
    }
    for (int64_t i = 0; i < blocks; ++i) {
      const Block<T> k(s.channels, b, first_block + i);
      for (int64_t n = 0; n < N; ++n)
        store(s.grad_A + (b * N + n) * s.channels + k.first, sum_A[i * N + n], k.count);
      if (s.grad_D) store(s.grad_D + b * s.channels + k.first, sum_D[i], k.count);
    }
  }

  void recompute(int64_t i, int64_t chunk, int64_t begin, int64_t end) {
    const Block<T> k(s.channels, b, first_block + i);
    if (chunk) std::memcpy(states.data(), checkpoint(s, b, first_block + i, chunk), N * sizeof(V));
    else std::fill(states.begin(), states.begin() + N, V{});
    for (int64_t t = begin; t < end; ++t) {
      const V d = step_size(s, k, t), du = d * load(s.u.at(b, t) + k.first, k.count);
      step[t - begin] = d;
      const T *B = s.B.at(b, t);
      V *h = &states[(t - begin) * N], *a = &decay[(t - begin) * N];
      for (int64_t n = 0; n < N; ++n) {
        a[n] = power_of_two(d * A[i * N + n]);
        h[N + n] = a[n] * h[n] + du * B[n];
      }
    }
  }

  void back_through_step(int64_t i, int64_t t, int64_t place) {
    const Block<T> k(s.channels, b, first_block + i);
    const T *B = s.B.at(b, t), *C = s.C.at(b, t);
    const V *before = &states[place * N], *after = before + N, *a = &decay[place * N];
    V *later = &from_later[i * N], *to_A = &sum_A[i * N];
    V *to_B = &sum_B[place * N], *to_C = &sum_C[place * N];
    const V d = step[place], x = load(s.u.at(b, t) + k.first, k.count), du = d * x;
    const V D = s.D ? load(s.D + k.first, k.count) : V{};
    V grad = load(s.grad_y.at(b, t) + k.first, k.count);
    if (s.gate.data) {
      V y = D * x;
      for (int64_t n = 0; n < N; ++n) y += after[n] * C[n];
      const V z = load(s.gate.at(b, t) + k.first, k.count), open = sigmoid(z);
      store(s.grad_gate.at(b, t) + k.first, grad * y * open * (1 + z * (1 - open)), k.count);
      grad *= z * open;
    }
    sum_D[i] += grad * x;
    V grad_du{}, grad_d{};
    for (int64_t n = 0; n < N; ++n) {
      to_C[n] += grad * after[n];
      const V g = later[n] + grad * C[n];
      to_B[n] += g * du;
      grad_du += g * B[n];
      later[n] = g * a[n];
      const V exponent = later[n] * before[n];
      grad_d += exponent * A[i * N + n];
      to_A[n] += exponent * d;
    }
    store(s.grad_u.at(b, t) + k.first, grad_du * d + grad * D, k.count);
    grad_d = grad_d * T(kLn2) + grad_du * x;
    if (s.softplus) {
      const V raw = load(s.delta.at(b, t) + k.first, k.count);
      grad_d = raw > 20 ? grad_d : grad_d * sigmoid(raw);
    }
    store(s.grad_delta.at(b, t) + k.first, grad_d, k.count);
  }

  void write_sums(int64_t begin, int64_t end) {
    const int64_t place = ((group * s.batch + b) * s.length + begin) * N;
    for (int64_t j = 0; j < (end - begin) * N; ++j) {
      s.grad_B[place + j] = sum_of_lanes<T>(sum_B[j]);
      s.grad_C[place + j] = sum_of_lanes<T>(sum_C[j]);
    }
  }
};

// ---- the convolution, followed by SiLU -----------------------------------------------------

template <class T>
Vec<T> convolved(const Convolution<T> &c, const Block<T> &k, const Vec<T> *weight,
                 const Vec<T> &bias, int64_t t) {
  Vec<T> sum = bias;
  for (int64_t tap = std::max<int64_t>(0, c.taps - 1 - t); tap < c.taps; ++tap)
    sum += weight[tap] * load(c.x.at(k.b, t - (c.taps - 1) + tap) + k.first, k.count);
  return sum;
}

template <class T> void convolve_block(const Convolution<T> &c, int64_t b, int64_t index) {
  using V = Vec<T>;
  const Block<T> k(c.channels, b, index);
  std::vector<V> weight(c.taps);
  for (int64_t i = 0; i < c.taps; ++i)
    weight[i] = load(c.weight + i * c.channels + k.first, k.count);
  const V bias = load(c.bias + k.first, k.count);
  for (int64_t t = 0; t < c.length; ++t) {
    const V sum = convolved(c, k, weight.data(), bias, t);
    store(c.y.at(b, t) + k.first, sum * sigmoid(sum), k.count);
  }
}

template <class T> void convolve_back_block(const Convolution<T> &c, int64_t b, int64_t index) {
  using V = Vec<T>;
  const Block<T> k(c.channels, b, index);
  // `later[j]` is the gradient at the sum of step t + j.
  std::vector<V> weight(c.taps), sum_weight(c.taps, V{}), later(c.taps, V{});
  for (int64_t i = 0; i < c.taps; ++i)
    weight[i] = load(c.weight + i * c.channels + k.first, k.count);
  const V bias = load(c.bias + k.first, k.count);
  V sum_bias{};
  for (int64_t t = c.length - 1; t >= 0; --t) {
    const V sum = convolved(c, k, weight.data(), bias, t), open = sigmoid(sum);
    const V grad_y = load(c.grad_y.at(b, t) + k.first, k.count);
    for (int64_t j = c.taps - 1; j > 0; --j) later[j] = later[j - 1];
    later[0] = grad_y * open * (1 + sum * (1 - open));
    sum_bias += later[0];
    const V x = load(c.x.at(b, t) + k.first, k.count);
    V grad_x{};
    for (int64_t j = 0; j < c.taps; ++j) {
      grad_x += weight[c.taps - 1 - j] * later[j];
      sum_weight[c.taps - 1 - j] += x * later[j];
    }
    store(c.grad_x.at(b, t) + k.first, grad_x, k.count);
  }
  for (int64_t i = 0; i < c.taps; ++i)
    store(c.grad_weight + (b * c.taps + i) * c.channels + k.first, sum_weight[i], k.count);
  store(c.grad_bias + b * c.channels + k.first, sum_bias, k.count);
}

// ---- tasks over threads ---------------------------------------------------------------------

template <class Task> void for_each(int64_t tasks, int64_t threads, const Task &task) {
  const int team = static_cast<int>(std::max<int64_t>(1, std::min(threads, tasks)));
  (void)team;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

template <class T> void scan_forward(const Scan<T> &s) {
  const int64_t blocks = blocks_of<T>(s.channels);
  for_each(s.batch * blocks, s.threads,
           [&](int64_t i) { forward_block(s, i / blocks, i % blocks); });
}

template <class T> int64_t groups_of(int64_t channels) {
  return (blocks_of<T>(channels) + kBlocksInGroup - 1) / kBlocksInGroup;
}

template <class T> void scan_backward(const Scan<T> &s) {
  const int64_t groups = groups_of<T>(s.channels);
  for_each(s.batch * groups, s.threads,
           [&](int64_t i) { BackwardTask<T>(s, i / groups, i % groups).run(); });
}

template <class T> void convolve(const Convolution<T> &c, bool back) {
  const int64_t blocks = blocks_of<T>(c.channels);
  for_each(c.batch * blocks, c.threads, [&](int64_t i) {
    if (back) convolve_back_block(c, i / blocks, i % blocks);
    else convolve_block(c, i / blocks, i % blocks);
  });
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int64_t vector_bytes() { return VECTOR_BYTES; }
EXPORTED int64_t blocks_in_group() { return kBlocksInGroup; }
EXPORTED int64_t has_threads() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}
EXPORTED void scan_forward_float(const Scan<float> *s) { scan_forward(*s); }
EXPORTED void scan_forward_double(const Scan<double> *s) { scan_forward(*s); }
EXPORTED void scan_backward_float(const Scan<float> *s) { scan_backward(*s); }
EXPORTED void scan_backward_double(const Scan<double> *s) { scan_backward(*s); }
EXPORTED void convolve_float(const Convolution<float> *c) { convolve(*c, false); }
EXPORTED void convolve_double(const Convolution<double> *c) { convolve(*c, false); }
EXPORTED void convolve_backward_float(const Convolution<float> *c) { convolve(*c, true); }
EXPORTED void convolve_backward_double(const Convolution<double> *c) { convolve(*c, true); }
