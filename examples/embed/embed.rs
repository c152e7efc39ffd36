// Which features of an SAE fire on two tokens, through the C interface:
// rustc embed.rs -C link-args="LIB/libsts_c.so.1 -Wl,-rpath,LIB", LIB being the folder of that library.
use std::ffi::{c_char, c_int, c_void, CStr};
use std::ptr::{null, null_mut};

#[repr(C)]
struct Matrix {
    data: *const c_void,
    dtype: c_int,
    n_rows: i64,
    n_cols: i64,
    row_stride: i64,
    col_stride: i64,
}

extern "C" {
    fn sts_last_error() -> *const c_char;
    fn sts_encoder_create(
        w_enc: *const Matrix, activation: c_int, bias: *const f32, scale: *const f32, threshold: *const f32,
        gate_bias: *const f32, k: i64, input_norm: c_int, encoder: *mut *mut c_void,
    ) -> c_int;
    fn sts_encoder_free(encoder: *mut c_void);
    fn sts_encode_sparse(
        encoder: *const c_void, acts: *const Matrix, columns: *const i64, n_columns: i64, rows: *mut *mut c_void,
    ) -> c_int;
    fn sts_sparse_rows_indptr(rows: *const c_void) -> *const i64;
    fn sts_sparse_rows_indices(rows: *const c_void) -> *const i32;
    fn sts_sparse_rows_values(rows: *const c_void) -> *const f32;
    fn sts_sparse_rows_free(rows: *mut c_void);
}

const FLOAT32: c_int = 0;
const RELU: c_int = 0;
const NO_NORM: c_int = 0;

fn matrix(values: &[f32], n_cols: i64) -> Matrix {
    let n_rows = values.len() as i64 / n_cols;
    Matrix { data: values.as_ptr().cast(), dtype: FLOAT32, n_rows, n_cols, row_stride: n_cols, col_stride: 1 }
}

fn check(status: c_int) {
    if status != 0 {
        eprintln!("error: {}", unsafe { CStr::from_ptr(sts_last_error()) }.to_string_lossy());
        std::process::exit(1);
    }
}

fn main() {
    let (w_enc, bias, base) = ([1.0, 0.0, 1.0, 0.0, 1.0, -1.0], [0.0f32, -1.0, 0.0], [1.0, 2.0, 3.0, 0.0]);
    let (mut encoder, mut active) = (null_mut(), null_mut());
    unsafe {
        check(sts_encoder_create(
            &matrix(&w_enc, 3), RELU, bias.as_ptr(), null(), null(), null(), 0, NO_NORM, &mut encoder,
        ));
        check(sts_encode_sparse(encoder, &matrix(&base, 2), null(), 0, &mut active));
        let indptr = std::slice::from_raw_parts(sts_sparse_rows_indptr(active), 3);
        for t in 0..2 {
            for i in indptr[t] as usize..indptr[t + 1] as usize {
                let (feature, value) =
                    (*sts_sparse_rows_indices(active).add(i), *sts_sparse_rows_values(active).add(i));
                println!("token {t}: feature {feature} = {value}");
            }
        }
        sts_sparse_rows_free(active);
        sts_encoder_free(encoder);
    }
}
