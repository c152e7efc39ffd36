"""Which features of an SAE fire on two tokens, through the C interface alone: python embed.py path/of/libsts_c.so.1

So does any language that can call C; from Python itself, `sts_fast.encode` and `sts_fast.ShiftStats` are simpler.
"""

import ctypes
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_void_p

FLOAT32, RELU, NO_NORM = 0, 0, 0


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("dtype", c_int32),
        ("n_rows", c_int64),
        ("n_cols", c_int64),
        ("row_stride", c_int64),
        ("col_stride", c_int64),
    )

    def __init__(self, values: ctypes.Array[c_float], n_rows: int, n_cols: int) -> None:
        super().__init__(ctypes.addressof(values), FLOAT32, n_rows, n_cols, n_cols, 1)
        self.values = values  # its memory is borrowed


def floats(*values: float) -> ctypes.Array[c_float]:
    return (c_float * len(values))(*values)


sts = ctypes.CDLL(sys.argv[1])
sts.sts_last_error.restype = c_char_p
sts.sts_encoder_create.argtypes = (
    *(POINTER(Matrix), c_int32, POINTER(c_float), c_void_p, c_void_p, c_void_p),
    *(c_int64, c_int32, POINTER(c_void_p)),
)
sts.sts_encode_sparse.argtypes = c_void_p, POINTER(Matrix), c_void_p, c_int64, POINTER(c_void_p)
for part, element in (("indptr", c_int64), ("indices", c_int32), ("values", c_float)):
    function = getattr(sts, f"sts_sparse_rows_{part}")
    function.argtypes, function.restype = [c_void_p], POINTER(element)
for handle in ("encoder", "sparse_rows"):
    getattr(sts, f"sts_{handle}_free").argtypes = [c_void_p]


def check(status: int) -> None:
    if status:
        sys.exit(f"error: {sts.sts_last_error().decode()}")


W_enc, base = Matrix(floats(1, 0, 1, 0, 1, -1), 2, 3), Matrix(floats(1, 2, 3, 0), 2, 2)
encoder, active = c_void_p(), c_void_p()
check(sts.sts_encoder_create(W_enc, RELU, floats(0, -1, 0), None, None, None, 0, NO_NORM, byref(encoder)))
check(sts.sts_encode_sparse(encoder, base, None, 0, byref(active)))
indptr = sts.sts_sparse_rows_indptr(active)
for t in range(2):
    for i in range(indptr[t], indptr[t + 1]):
        feature, value = sts.sts_sparse_rows_indices(active)[i], sts.sts_sparse_rows_values(active)[i]
        print(f"token {t}: feature {feature} = {value:g}")
sts.sts_sparse_rows_free(active)
sts.sts_encoder_free(encoder)
