// Types that all kernels use: numbers, elements, vectors of them.
//
// Options: DTYPE 0 = f32, 1 = bf16, 2 = f16.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#if DTYPE == 0
typedef float T;
constexpr int VEC = 4;    // elements in 16 bytes
constexpr int KSTEP = 8;  // contraction length of one tensor core step
#else
typedef unsigned short T;
constexpr int VEC = 8;
constexpr int KSTEP = 16;
#endif
constexpr int HALF_VEC = VEC / 2;

struct alignas(16) Vec {
  u32 w[4];  // 4 x f32 or 8 x half; element 0 in the low bits
};
struct alignas(8) HalfVec {
  u32 w[2];
};

// For `if constexpr` in lambdas.
struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};
