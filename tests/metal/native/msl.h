// The Metal Shading Language as TorchInductor and torch's own c10/metal headers use it, as C++20 for g++.
// What is missing fails to compile; nothing is approximated but the last digits of the transcendental functions.
#pragma once
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <source_location>
#include <type_traits>
#include <utility>

#include "engine.h"

// ---- types

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using half = _Float16;

// Two bytes in memory, rounded to nearest even on the way in. Arithmetic between two of them gives one, as in Metal,
// and with a float it gives a float.
struct bfloat {
  uint16_t bits = 0;
  bfloat() = default;
  template <class T>
    requires std::is_arithmetic_v<T> || std::is_same_v<T, half>
  bfloat(T value) {
    float f = float(value);
    uint32_t u;
    std::memcpy(&u, &f, sizeof u);
    bits = f != f ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
  }
#define MSL_BFLOAT_OPERATOR(op)                                                      \
  friend bfloat operator op(bfloat a, bfloat b) { return float(a) op float(b); }     \
  friend float operator op(bfloat a, float b) { return float(a) op b; }              \
  friend float operator op(float a, bfloat b) { return a op float(b); }
  MSL_BFLOAT_OPERATOR(+) MSL_BFLOAT_OPERATOR(-) MSL_BFLOAT_OPERATOR(*) MSL_BFLOAT_OPERATOR(/)
  bfloat& operator+=(bfloat b) { return *this = *this + b; }
};

template <class T, int N>
struct vec;

#define MSL_OPERATOR(op) \
  friend vec operator op(vec a, vec b) { for (int i = 0; i < kSize; i++) a[i] = a[i] op b[i]; return a; }
#define MSL_VECTOR_BODY(N)                                                    \
  static constexpr int kSize = N;                                             \
  vec() = default;                                                            \
  vec(T s) { for (int i = 0; i < kSize; i++) (*this)[i] = s; }                \
  T& operator[](int i) { return (&x)[i]; }                                    \
  const T& operator[](int i) const { return (&x)[i]; }                        \
  MSL_OPERATOR(+) MSL_OPERATOR(-) MSL_OPERATOR(*) MSL_OPERATOR(/)

template <class T>
struct vec<T, 2> {
  T x, y;
  MSL_VECTOR_BODY(2)
  template <class A, class B> vec(A a, B b) : x(a), y(b) {}
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {  // takes the room of four, in group memory too
  T x, y, z;
  MSL_VECTOR_BODY(3)
  template <class A, class B, class C> vec(A a, B b, C c) : x(a), y(b), z(c) {}
};
template <class T>
struct vec<T, 4> {
  T x, y, z, w;
  MSL_VECTOR_BODY(4)
  template <class A, class B, class C, class D> vec(A a, B b, C c, D d) : x(a), y(b), z(c), w(d) {}
};

#define MSL_VECTORS(type) \
  using type##2 = vec<type, 2>; using type##3 = vec<type, 3>; using type##4 = vec<type, 4>;
MSL_VECTORS(char) MSL_VECTORS(uchar) MSL_VECTORS(short) MSL_VECTORS(ushort) MSL_VECTORS(int) MSL_VECTORS(uint)
MSL_VECTORS(long) MSL_VECTORS(ulong) MSL_VECTORS(half) MSL_VECTORS(bfloat) MSL_VECTORS(float)

template <class To, class From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

// ---- what the translation in shaders.py puts in a kernel's place

namespace msl {

// A device or constant pointer argument: every index is checked against the end of its buffer.
template <class T>
struct Buffer {
  T* data;
  long count;
  const char* name;
  template <class I>
  T& operator[](I i) const {
    const long index = long(i);
    if (index < 0 || index >= count) [[unlikely]] sim::fail_index(name, index, count);
    return data[index];
  }
};

template <class T>
T& group_array(const char* name) { return *static_cast<T*>(sim::group_memory(sizeof(T), name)); }

inline uint position(const uint32_t* p, uint*) { return p[0]; }
inline uint2 position(const uint32_t* p, uint2*) { return {p[0], p[1]}; }
inline uint3 position(const uint32_t* p, uint3*) { return {p[0], p[1], p[2]}; }

}  // namespace msl

// ---- namespace metal

namespace metal {

using ::vec;
using std::array;
using std::declval;
using std::enable_if_t;
using std::is_integral_v;
using std::is_same_v;
using std::is_signed_v;
using std::atomic;
using std::atomic_compare_exchange_weak_explicit;
using std::atomic_fetch_add_explicit;
using std::atomic_load_explicit;
using std::memory_order_relaxed;
using atomic_bool = std::atomic<bool>;

template <class T>
constexpr bool is_floating_point_v = std::is_same_v<T, float> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;
template <class T>
constexpr bool is_scalar_v = is_integral_v<T> || is_floating_point_v<T>;

template <class T>
struct numeric_limits : std::numeric_limits<T> {};
template <class T>
struct small_float_limits {  // g++ 12 knows neither type, and would answer 0
  static constexpr bool is_specialized = true;
  static T infinity() { return T(INFINITY); }
  static T quiet_NaN() { return T(NAN); }
};
template <>
struct numeric_limits<half> : small_float_limits<half> {
  static half max() { return half(65504.0f); }
  static half lowest() { return half(-65504.0f); }
};
template <>
struct numeric_limits<bfloat> : small_float_limits<bfloat> {
  static bfloat max() { return bfloat(3.3895314e38f); }
  static bfloat lowest() { return bfloat(-3.3895314e38f); }
};

// Functions of a half give a half; of anything else a float (Metal has no double).
template <class T>
using result_t = std::conditional_t<std::is_same_v<T, half>, half, float>;
#define MSL_UNARY(name) \
  template <class T> inline result_t<T> name(T x) { return result_t<T>(std::name(float(x))); }
#define MSL_BINARY(name) \
  template <class T, class U> inline result_t<T> name(T x, U y) { return result_t<T>(std::name(float(x), float(y))); }
#define MSL_MATH                                                                                            \
  MSL_UNARY(exp) MSL_UNARY(exp2) MSL_UNARY(log) MSL_UNARY(log2) MSL_UNARY(log10) MSL_UNARY(sqrt)            \
  MSL_UNARY(sin) MSL_UNARY(cos) MSL_UNARY(tan) MSL_UNARY(asin) MSL_UNARY(acos) MSL_UNARY(atan)              \
  MSL_UNARY(sinh) MSL_UNARY(cosh) MSL_UNARY(tanh) MSL_UNARY(asinh) MSL_UNARY(acosh) MSL_UNARY(atanh)        \
  MSL_UNARY(floor) MSL_UNARY(ceil) MSL_UNARY(trunc) MSL_UNARY(rint) MSL_UNARY(round) MSL_UNARY(fabs)        \
  MSL_BINARY(pow) MSL_BINARY(atan2) MSL_BINARY(fmod) MSL_BINARY(copysign) MSL_BINARY(fmin) MSL_BINARY(fmax) \
  template <class T> inline result_t<T> rsqrt(T x) { return result_t<T>(1.0f / std::sqrt(float(x))); }
MSL_MATH
namespace precise { MSL_MATH }
namespace fast { MSL_MATH }
inline float sinpi(float x) { return std::sin(x * float(M_PI)); }
inline float sincos(float x, float& c) { c = std::cos(x); return std::sin(x); }
inline float fract(float x) { return x - std::floor(x); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float ldexp(float x, int e) { return std::ldexp(x, e); }
inline float dot(float2 a, float2 b) { return a.x * b.x + a.y * b.y; }

template <class T>
inline auto abs(T x) {
  if constexpr (is_integral_v<T>) return T(x < 0 ? -x : x); else return result_t<T>(std::fabs(float(x)));
}
template <class T> inline T sign(T x) { return x > 0 ? T(1) : x < 0 ? T(-1) : T(0); }
template <class T> inline bool isnan(T x) { return float(x) != float(x); }
template <class T> inline bool isinf(T x) { return std::isinf(float(x)); }
template <class T> inline bool isfinite(T x) { return std::isfinite(float(x)); }
template <class T> inline bool signbit(T x) { return std::signbit(float(x)); }
template <class T> inline bool isunordered(T a, T b) { return isnan(a) || isnan(b); }
template <class T>
inline T max(T a, T b) {  // of a number and NaN: the number
  if constexpr (is_integral_v<T>) return a < b ? b : a; else return T(std::fmax(float(a), float(b)));
}
template <class T>
inline T min(T a, T b) {
  if constexpr (is_integral_v<T>) return b < a ? b : a; else return T(std::fmin(float(a), float(b)));
}
template <class T> inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T> inline T select(T a, T b, bool c) { return c ? b : a; }
template <class T> inline T ctz(T x) { return x ? T(__builtin_ctzll(static_cast<unsigned long long>(x))) : T(8 * sizeof(T)); }
template <class T>
inline T clz(T x) {
  T n = 0;
  for (int bit = 8 * sizeof(T) - 1; bit >= 0 && !(x >> bit & 1); bit--) n++;
  return n;
}

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };

#define MSL_SITE const std::source_location at = std::source_location::current()
#define MSL_AT sim::Site{at.line(), at.function_name()}

inline void threadgroup_barrier(mem_flags, MSL_SITE) { sim::barrier(MSL_AT); }
inline void simdgroup_barrier(mem_flags, MSL_SITE) { char nothing = 0; sim::exchange(&nothing, 1, MSL_AT); }

}  // namespace metal

namespace msl {

// What every lane of a simdgroup contributed; only lanes that took part may be read.
template <class T>
class Contributions {
 public:
  Contributions(T own, sim::Site site) : lanes_(sim::exchange(&own, sizeof own, site)) {}
  unsigned own() const { return lanes_.own; }
  bool has(int lane) const { return lane >= 0 && lane < 32 && lanes_.active >> lane & 1; }
  T operator[](int lane) const {
    T value;
    std::memcpy(static_cast<void*>(&value), lanes_.values[lane], sizeof value);
    return value;
  }

 private:
  sim::Lanes lanes_;
};

// Lanes that did not take part contribute nothing. As a tree, since hardware does not add in order either.
template <class T, class F>
inline T reduce(T own, F combine, sim::Site site) {
  Contributions<T> from(own, site);
  T value[32];
  bool has[32];
  for (int l = 0; l < 32; l++) if ((has[l] = from.has(l))) value[l] = from[l];
  for (int half = 16; half; half /= 2)
    for (int l = 0; l < half; l++) {
      if (has[l] && has[l + half]) value[l] = combine(value[l], value[l + half]);
      else if (has[l + half]) value[l] = value[l + half], has[l] = true;
    }
  return value[0];
}

template <class T>
inline T poison() {
  T value;
  std::memset(static_cast<void*>(&value), 0xff, sizeof value);
  return value;
}

// Reading a lane that did not take part is undefined in Metal: NaN here.
template <class T>
inline T read_lane(const Contributions<T>& from, int lane) { return from.has(lane) ? from[lane] : poison<T>(); }

}  // namespace msl

namespace metal {

template <class T> inline T simd_sum(T v, MSL_SITE) { return msl::reduce(v, [](T a, T b) { return T(a + b); }, MSL_AT); }
template <class T> inline T simd_product(T v, MSL_SITE) { return msl::reduce(v, [](T a, T b) { return T(a * b); }, MSL_AT); }
template <class T> inline T simd_max(T v, MSL_SITE) { return msl::reduce(v, [](T a, T b) { return max(a, b); }, MSL_AT); }
template <class T> inline T simd_min(T v, MSL_SITE) { return msl::reduce(v, [](T a, T b) { return min(a, b); }, MSL_AT); }
inline bool simd_any(bool v, MSL_SITE) { return msl::reduce(v, [](bool a, bool b) { return a || b; }, MSL_AT); }
inline bool simd_all(bool v, MSL_SITE) { return msl::reduce(v, [](bool a, bool b) { return a && b; }, MSL_AT); }

struct simd_vote {
  ulong bits;
  explicit operator ulong() const { return bits; }
};
inline simd_vote simd_ballot(bool v, MSL_SITE) {
  msl::Contributions<bool> from(v, MSL_AT);
  ulong bits = 0;
  for (int l = 0; l < 32; l++) if (from.has(l) && from[l]) bits |= 1ul << l;
  return {bits};
}

template <class T> inline T simd_broadcast(T v, ushort lane, MSL_SITE) { return msl::read_lane(msl::Contributions<T>(v, MSL_AT), lane); }
template <class T> inline T simd_shuffle(T v, ushort lane, MSL_SITE) { return msl::read_lane(msl::Contributions<T>(v, MSL_AT), lane); }
template <class T>
inline T simd_shuffle_down(T v, ushort delta, MSL_SITE) {
  msl::Contributions<T> from(v, MSL_AT);
  return msl::read_lane(from, int(from.own()) + delta);
}
template <class T>
inline T simd_shuffle_up(T v, ushort delta, MSL_SITE) {
  msl::Contributions<T> from(v, MSL_AT);
  return msl::read_lane(from, int(from.own()) - delta);
}
template <class T>
inline T simd_shuffle_and_fill_down(T v, T fill, ushort delta, MSL_SITE) {
  msl::Contributions<T> from(v, MSL_AT);
  const int lane = int(from.own()) + delta;
  return lane > 31 ? fill : msl::read_lane(from, lane);
}

}  // namespace metal

// ---- keywords and constants, last: the standard headers above use some of these words as names

#define expm1f msl_expm1f  // torch's headers define one, beside which the C library's would be ambiguous
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define M_PI_F 3.14159265358979323846f
#define M_LN2_F 0.69314718055994530942f
#define M_SQRT2_F 1.41421356237309504880f
#undef MAXFLOAT
#define MAXFLOAT 3.402823466e+38f
#define kernel
#define device
#define constant
#define threadgroup
#define thread
