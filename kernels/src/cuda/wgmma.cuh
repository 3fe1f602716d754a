// Hopper: products of a warpgroup, wgmma. Options: DTYPE 1 or 2.

// Operands stand in 128-byte rows, swizzled: 8 rows are 1024 bytes. Along the depth (K-major) the
// next 8 rows are 1024 bytes on; across it (MN-major) so are the next 8 of depth, and the next 64
// columns `leading_bytes`.
__device__ __forceinline__ u64 descriptor(u32 address, u32 leading_bytes) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)(leading_bytes >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// Of an operand across the depth, of as many columns as a row has: 16, 32 or 64.
template <int COLS>
__device__ __forceinline__ u64 narrow_descriptor(u32 address) {
  constexpr u64 SWIZZLE = COLS == 16 ? 3 : COLS == 32 ? 2 : 1;
  return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(8 * COLS * 2 >> 4) << 32 | SWIZZLE << 62;
}
constexpr u32 DEPTH_STEP = 32 >> 4;  // 16 of depth along it, in descriptor units

// d[8 columns][4] (+)= left · rightᵀ, 64 x N, of operands that lie along the depth, or both ACROSS it.
#define F4OF(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define NARROW(n) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." HALF_NAME "." HALF_NAME " "
template <bool ACROSS = false>
__device__ __forceinline__ void wgmma_narrow(float (&d)[1][4], u64 left, u64 right, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n" NARROW("8") "{%0,%1,%2,%3}, %4, %5, p, 1, 1, %7, %8;\n}"
               : F4OF(d[0])
               : "l"(left), "l"(right), "r"(accumulate), "n"(ACROSS), "n"(ACROSS));
}
template <bool ACROSS = false>
__device__ __forceinline__ void wgmma_narrow(float (&d)[2][4], u64 left, u64 right, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n" NARROW("16") "{%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, p, 1, 1, %11, %12;\n}"
               : F4OF(d[0]), F4OF(d[1])
               : "l"(left), "l"(right), "r"(accumulate), "n"(ACROSS), "n"(ACROSS));
}
template <bool ACROSS = false>
__device__ __forceinline__ void wgmma_narrow(float (&d)[4][4], u64 left, u64 right, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n" NARROW("32") "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, p, 1, 1, %19, %20;\n}"
               : F4OF(d[0]), F4OF(d[1]), F4OF(d[2]), F4OF(d[3])
               : "l"(left), "l"(right), "r"(accumulate), "n"(ACROSS), "n"(ACROSS));
}
template <bool ACROSS = false>
__device__ __forceinline__ void wgmma_narrow(float (&d)[8][4], u64 left, u64 right, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" NARROW("64") "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, %35, %36;\n}"
               : F4OF(d[0]), F4OF(d[1]), F4OF(d[2]), F4OF(d[3]), F4OF(d[4]), F4OF(d[5]), F4OF(d[6]), F4OF(d[7])
               : "l"(left), "l"(right), "r"(accumulate), "n"(ACROSS), "n"(ACROSS));
}
template <bool ACROSS = false>
__device__ __forceinline__ void wgmma_narrow(float (&d)[16][4], u64 left, u64 right, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" NARROW("128") "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, p, 1, 1, %67, %68;\n}"
               : F4OF(d[0]), F4OF(d[1]), F4OF(d[2]), F4OF(d[3]), F4OF(d[4]), F4OF(d[5]), F4OF(d[6]), F4OF(d[7]), F4OF(d[8]), F4OF(d[9]), F4OF(d[10]), F4OF(d[11]), F4OF(d[12]), F4OF(d[13]), F4OF(d[14]), F4OF(d[15])
               : "l"(left), "l"(right), "r"(accumulate), "n"(ACROSS), "n"(ACROSS));
}
// The same of a left operand in registers, 16 of depth, and a right one that lies along the depth, or ACROSS it.
template <bool ACROSS>
__device__ __forceinline__ void wgmma_narrow(float (&d)[2][4], const u32 (&left)[4], u64 right, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n" NARROW("16") "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1, %14;\n}"
               : F4OF(d[0]), F4OF(d[1])
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(accumulate), "n"(ACROSS));
}
template <bool ACROSS>
__device__ __forceinline__ void wgmma_narrow(float (&d)[4][4], const u32 (&left)[4], u64 right, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n" NARROW("32") "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, %22;\n}"
               : F4OF(d[0]), F4OF(d[1]), F4OF(d[2]), F4OF(d[3])
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(accumulate), "n"(ACROSS));
}
template <bool ACROSS>
__device__ __forceinline__ void wgmma_narrow(float (&d)[8][4], const u32 (&left)[4], u64 right, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" NARROW("64") "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}"
               : F4OF(d[0]), F4OF(d[1]), F4OF(d[2]), F4OF(d[3]), F4OF(d[4]), F4OF(d[5]), F4OF(d[6]), F4OF(d[7])
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(accumulate), "n"(ACROSS));
}
// d[128] (+)= left · rightᵀ, 64 x 256, of a left operand that lies along the depth, and a right one that does or lies ACROSS it.
#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(d, i) F4(d, i), F4(d, i + 4), F4(d, i + 8), F4(d, i + 12)
#define F64(d, i) F16(d, i), F16(d, i + 16), F16(d, i + 32), F16(d, i + 48)
template <bool ACROSS>
__device__ __forceinline__ void wgmma(float (&d)[128], u64 left, u64 right, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." HALF_NAME "." HALF_NAME " {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127},"
      " %128, %129, p, 1, 1, 0, %131;\n}"
      : F64(d, 0), F64(d, 64)
      : "l"(left), "l"(right), "r"(accumulate), "n"(ACROSS));
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
