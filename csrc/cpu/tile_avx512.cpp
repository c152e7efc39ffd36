#define STS_ISA avx512
#include "cpu/tile_fold.h"
#include "cpu/tile_pack.h"
#include "cpu/tile_product.h"

namespace sts::cpu {

const TileKernels kTileAvx512{"avx512",        avx512::kPanelRows, avx512::kPanelColumns, avx512::pack_run,
                              avx512::product, avx512::fold_shift, avx512::fold_moments,  avx512::select};

}  // namespace sts::cpu
