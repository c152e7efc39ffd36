#define STS_ISA portable
#include "cpu/tile_fold.h"
#include "cpu/tile_pack.h"
#include "cpu/tile_product.h"

namespace sts::cpu {

const TileKernels kTilePortable{"portable",        portable::kPanelRows, portable::kPanelColumns, portable::pack_run,
                                portable::product, portable::fold_shift, portable::fold_moments,  portable::select};

}  // namespace sts::cpu
