//! `digest`: how content is known again.

use dicomnode_core::digest::Kind;
use dicomnode_core::source::Source;
use dicomnode_core::{Error, Result};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::detached;
use crate::memory::Owner;

/// The digest of a file from `start` on, or of memory: SHA-256 (`size` 32), or BLAKE3 cut to 16 bytes.
///
/// Raises OSError, and ValueError for any other size.
#[pyfunction]
#[pyo3(signature = (source, size = 32, start = 0))]
pub fn digest<'py>(
    py: Python<'py>,
    source: &Bound<'py, PyAny>,
    size: usize,
    start: usize,
) -> PyResult<Bound<'py, PyBytes>> {
    let kind = kind_of(size)?;
    let owner = Owner::of_source(source).or_else(|_| Owner::of_pixels(source))?;
    let given = owner.source(py);
    let found = detached(py, || digest_of(kind, &given, start))?;
    Ok(PyBytes::new(py, &found))
}

fn digest_of(kind: Kind, source: &Source<'_>, start: usize) -> Result<Vec<u8>> {
    match source {
        Source::Bytes(bytes) => Ok(kind.of(bytes.get(start..).unwrap_or_default())),
        Source::File(path) => kind
            .of_file(path, start as u64)
            .map_err(|error| Error::io(path, error)),
    }
}

/// Raises ValueError.
pub fn kind_of(size: usize) -> PyResult<Kind> {
    Kind::of_size(size).ok_or_else(|| {
        PyValueError::new_err(format!("expected digests of 32 or 16 bytes, found {size}"))
    })
}
