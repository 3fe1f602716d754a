// Hopper: the tile of the product, its copies within a cluster and its step on the tensor cores.
// Options: DTYPE 1 or 2, BACKWARD, DOWN, RANK_STEPS.
constexpr int TILE_ROWS = 128, TILE_COLS = 256, TILE_DEPTH = 64;
constexpr int STAGES = 4;
constexpr int CLUSTER = 2;
constexpr int GROUP = 8;  // cluster rows that are walked together, so that W is reused in L2
constexpr int INPUT_BYTES = TILE_ROWS * TILE_DEPTH * 2, WEIGHT_BYTES = TILE_COLS * TILE_DEPTH * 2;
constexpr int STAGE_BYTES = INPUT_BYTES + WEIGHT_BYTES;
constexpr int STORE_BYTES = 16 * 64 * 2;  // a store box: 16 rows of 128 bytes
constexpr int THREADS = 384, SHARED_BYTES = STAGES * STAGE_BYTES + 8 * 2 * STORE_BYTES;  // as in hopper.rs
constexpr int LOADER_REGISTERS = 40, MATH_REGISTERS = 232;

// ---- copies within a cluster -----------------------------------------------------------------
__device__ __forceinline__ void load_box_for_cluster(u32 dst, const TensorMap& map, int col, int row, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(dst),
      "l"(&map), "r"(col), "r"(row), "r"(bar), "h"((unsigned short)((1 << CLUSTER) - 1))
      : "memory");
}
__device__ __forceinline__ void store_box(const TensorMap& map, int col, int row, u32 src) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(col), "r"(row), "r"(src)
               : "memory");
}
__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// ---- wgmma ---------------------------------------------------------------------------------
constexpr u32 WEIGHT_COLS_BYTES = TILE_DEPTH * 128;             // to the next 64 columns of a tile of W, backward
constexpr u32 WEIGHT_STEP = BACKWARD ? 2048 >> 4 : DEPTH_STEP;  // 16 rows, or 32 bytes of a row

#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(d, i) F4(d, i), F4(d, i + 4), F4(d, i + 8), F4(d, i + 12)
#define F64(d, i) F16(d, i), F16(d, i + 16), F16(d, i + 32), F16(d, i + 48)
#if BACKWARD
#define TRANSPOSE_WEIGHT "1"
#else
#define TRANSPOSE_WEIGHT "0"
#endif
__device__ __forceinline__ void wgmma(float (&d)[128], u64 input, u64 weight, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." HALF_NAME "." HALF_NAME " {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127},"
      " %128, %129, p, 1, 1, 0, " TRANSPOSE_WEIGHT ";\n}"
      : F64(d, 0), F64(d, 64)
      : "l"(input), "l"(weight), "r"(accumulate));
}
