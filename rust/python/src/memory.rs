//! Python objects as the memory and the paths that the core takes.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use dicomnode_core::bytes::Bytes;
use dicomnode_core::source::Source;
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::receive::Received;

/// What holds the bytes of an object; it keeps them alive.
pub enum Owner {
    Path(PathBuf),
    Bytes(Py<PyBytes>),
    Dataset(Arc<Bytes>),
    Buffer(PyUntypedBuffer),
}

impl Owner {
    /// A `str` (path), or `bytes` or other memory that is never written to (the object).
    pub fn of_source(source: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(bytes) = source.cast::<PyBytes>() {
            Ok(Owner::Bytes(bytes.clone().unbind()))
        } else if let Ok(path) = source.cast::<PyString>() {
            Ok(Owner::Path(path.extract::<OsString>()?.into()))
        } else if let Ok(received) = source.cast::<Received>() {
            Owner::of_pixels(received)
        } else {
            let found = source.get_type().name()?;
            Err(PyTypeError::new_err(format!(
                "expected a source of str or bytes, found {found}"
            )))
        }
    }

    /// Any C-contiguous memory.
    pub fn of_pixels(pixels: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(pixels)?;
        if !buffer.is_c_contiguous() {
            return Err(PyValueError::new_err(
                "expected C-contiguous pixels, found others",
            ));
        }
        Ok(Owner::Buffer(buffer))
    }

    /// The source as the core takes it.
    pub fn source<'a>(&'a self, py: Python<'_>) -> Source<'a> {
        match self {
            Owner::Path(path) => Source::File(path),
            Owner::Bytes(bytes) => Source::Bytes(bytes.as_bytes(py)),
            Owner::Dataset(dataset) => Source::Bytes(dataset),
            Owner::Buffer(buffer) => Source::Bytes(buffer_bytes(buffer)),
        }
    }

    /// The object in memory, None for a file.
    pub fn bytes<'a>(&'a self, py: Python<'_>) -> Option<&'a [u8]> {
        match self.source(py) {
            Source::Bytes(bytes) => Some(bytes),
            Source::File(_) => None,
        }
    }
}

fn buffer_bytes(buffer: &PyUntypedBuffer) -> &[u8] {
    let length = buffer.len_bytes();
    if length == 0 {
        return &[];
    }
    // SAFETY: the exporter keeps `len_bytes` contiguous initialised bytes at this address until the
    // buffer is released, which the borrow prevents; callers are told not to write meanwhile.
    unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<u8>(), length) }
}

/// The element types of an output array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    Float32,
    Float64,
    Int8,
    Uint8,
    Int16,
    Uint16,
    Int32,
    Uint32,
}

/// The array that results are written to.
pub struct Out {
    buffer: PyUntypedBuffer,
    pub dtype: Dtype,
    pub slices: usize,
    pub rows: usize,
    pub columns: usize,
    pub samples: usize,
}

impl Out {
    /// Check everything that writing to it relies on.
    pub fn new(out: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(out)?;
        let format = buffer.format().to_string_lossy().into_owned();
        let native = if cfg!(target_endian = "little") {
            '<'
        } else {
            '>'
        };
        let code = format.trim_start_matches(['@', '=', native]);
        let dtype = match (code, buffer.item_size()) {
            ("f", 4) => Dtype::Float32,
            ("d", 8) => Dtype::Float64,
            ("b", 1) => Dtype::Int8,
            ("B", 1) => Dtype::Uint8,
            ("h", 2) => Dtype::Int16,
            ("H", 2) => Dtype::Uint16,
            ("i" | "l", 4) => Dtype::Int32,
            ("I" | "L", 4) => Dtype::Uint32,
            _ => {
                return Err(PyTypeError::new_err(format!(
                    "expected out of float32, float64 or an 8, 16 or 32 bit integer in native byte \
                     order, found {}",
                    out.getattr("dtype")
                        .map_or(format, |dtype| dtype.to_string()),
                )));
            }
        };
        let (slices, rows, columns, samples) = match *buffer.shape() {
            [slices, rows, columns] => (slices, rows, columns, 1),
            [slices, rows, columns, samples] => (slices, rows, columns, samples),
            _ => {
                return Err(PyValueError::new_err(format!(
                    "expected out with 3 dimensions (slice, row, column), or a fourth of samples, \
                     found {}",
                    buffer.dimensions()
                )));
            }
        };
        if !buffer.is_c_contiguous() {
            return Err(PyValueError::new_err(
                "expected a C-contiguous out, found another order",
            ));
        }
        if buffer.readonly() {
            return Err(PyValueError::new_err(
                "expected a writeable out, found a read-only one",
            ));
        }
        if !buffer.buf_ptr().addr().is_multiple_of(buffer.item_size()) {
            return Err(PyValueError::new_err(
                "expected an aligned out, found an unaligned one",
            ));
        }
        Ok(Out {
            buffer,
            dtype,
            slices,
            rows,
            columns,
            samples,
        })
    }

    /// Whether some of `bytes` is memory of this array.
    pub fn overlaps(&self, bytes: &[u8]) -> bool {
        let start = self.buffer.buf_ptr().addr();
        let range = bytes.as_ptr_range();
        range.start.addr() < start + self.buffer.len_bytes() && start < range.end.addr()
    }

    /// The array as a slice of `T`.
    ///
    /// # Safety
    /// `T` is the type that `dtype` names, and nothing that the slice is used together with overlaps
    /// the array.
    pub unsafe fn as_mut_slice<T>(&mut self) -> &mut [T] {
        let count = self.buffer.item_count();
        if count == 0 {
            return &mut [];
        }
        // SAFETY: `new` found `count` aligned, contiguous, writeable items of the caller's `T`; the
        // exporter keeps them until the buffer is released, which the borrow prevents.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.buf_ptr().cast::<T>(), count) }
    }
}
