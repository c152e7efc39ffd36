#define STS_ISA avx2
#include "cpu/tile_fold.h"
#include "cpu/tile_pack.h"
#include "cpu/tile_product.h"

namespace sts::cpu {

const TileKernels kTileAvx2{"avx2",        avx2::kPanelRows, avx2::kPanelColumns, avx2::pack_run,
                            avx2::product, avx2::fold_shift, avx2::fold_moments,  avx2::select};

}  // namespace sts::cpu
