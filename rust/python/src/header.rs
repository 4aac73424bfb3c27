//! `Header`, `scan` and `is_dicom`.

use std::ffi::OsString;
use std::path::PathBuf;

use dicomnode_core::{extent, names, scan as core};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::errors::{attached, detached};
use crate::memory::Owner;

/// So many bytes take milliseconds at most, and as a rule far less than to let go of the interpreter beside others.
const MOST_AT_ONCE: usize = 1 << 20;

/// Where every top-level element of one object lies (PS3.10 section 7, PS3.5 section 7).
///
/// Holds the bytes up to the pixel data; the pixel data itself is never read.
#[pyclass(frozen, module = "dicomnode._core")]
pub struct Header {
    header: core::Header,
    owner: Owner,
}

#[pymethods]
impl Header {
    /// Transfer Syntax UID of the dataset; guessed from the bytes where the file meta is absent.
    #[getter]
    fn transfer_syntax(&self) -> &str {
        self.header.layout().transfer_syntax()
    }

    /// Bytes of the (Float/Double) Pixel Data value, None without or with undefined length.
    #[getter]
    fn pixel_length(&self) -> Option<u32> {
        let length = self.header.layout().pixels()?.length;
        (length != core::UNDEFINED).then_some(length)
    }

    /// Whether the dataset is encoded big endian.
    #[getter]
    fn big_endian(&self) -> bool {
        self.header.layout().big_endian()
    }

    fn __contains__(&self, tag: u32) -> bool {
        self.header.layout().find(tag).is_some()
    }

    /// VR (empty where the encoding has none) and raw value bytes of a top-level element.
    ///
    /// Not the value of pixel data or of an undefined-length sequence: those give None, as do
    /// absent elements; `in` tells them apart.
    fn get<'py>(
        &self,
        py: Python<'py>,
        tag: u32,
    ) -> PyResult<Option<(Bound<'py, PyString>, Bound<'py, PyBytes>)>> {
        let found = self.value(py, tag)?;
        Ok(found.map(|(entry, value)| (PyString::new(py, entry.vr()), PyBytes::new(py, &value))))
    }

    /// A short ASCII value (UI, CS, IS) without padding; empty where absent. What is no ASCII is a replacement character.
    fn text<'py>(&self, py: Python<'py>, tag: u32) -> PyResult<Bound<'py, PyString>> {
        let value = self.value(py, tag)?;
        let value = value.as_ref().map_or(&b""[..], |(_, value)| value);
        let text: String = value
            .iter()
            .map(|&byte| match char::from(byte) {
                one if one.is_ascii() => one,
                _ => char::REPLACEMENT_CHARACTER,
            })
            .collect();
        Ok(PyString::new(py, text.trim_matches([' ', '\0'])))
    }

    /// How many bytes of uncompressed pixel data are missing by Rows, Columns, BitsAllocated, SamplesPerPixel and NumberOfFrames;
    /// 0 where none are, or where the header does not tell.
    fn missing_pixels(&self, py: Python<'_>) -> PyResult<u64> {
        let whole = self.owner.bytes(py);
        self.look(py, || extent::missing_pixels(&self.header, whole))
    }

    /// The tags present, in the order of the file, group 0002 left out.
    fn tags(&self) -> Vec<u32> {
        self.header.layout().tags()
    }
}

impl Header {
    /// What was scanned of an object that its owner holds.
    pub fn new(header: core::Header, owner: Owner) -> Self {
        Header { header, owner }
    }

    /// An element of the top level with its raw value, as `get` gives it.
    fn value<'a>(&'a self, py: Python<'a>, tag: u32) -> PyResult<Option<core::Found<'a>>> {
        let whole = self.owner.bytes(py);
        self.look(py, || self.header.value(tag, whole))
    }

    /// Look something up, without the interpreter where that may read a file.
    fn look<T: Send>(
        &self,
        py: Python<'_>,
        find: impl FnOnce() -> dicomnode_core::Result<T> + Send,
    ) -> PyResult<T> {
        if self.header.is_in_memory() {
            attached(py, find)
        } else {
            detached(py, find)
        }
    }
}

/// Scan one object. With `transfer_syntax`, `source` is a bare dataset (as DIMSE carries it).
///
/// Raises InvalidDicom (not DICOM, truncated, lying lengths, nested too deep) or OSError.
#[pyfunction]
#[pyo3(signature = (source, transfer_syntax = None))]
pub fn scan(
    py: Python<'_>,
    source: &Bound<'_, PyAny>,
    transfer_syntax: Option<&str>,
) -> PyResult<Header> {
    let owner = Owner::of_source(source)?;
    let given = owner.source(py);
    let is_plain = transfer_syntax.is_some_and(|syntax| !core::is_deflated(syntax));
    let is_small = owner
        .bytes(py)
        .is_some_and(|bytes| bytes.len() <= MOST_AT_ONCE);
    let work = || core::scan(given, transfer_syntax);
    let header = if is_plain && is_small {
        attached(py, work)?
    } else {
        detached(py, work)?
    };
    Ok(Header { header, owner })
}

/// Whether a text is a UID (PS3.5 section 9.1): digits and dots, at most 64 characters.
///
/// Leading zeros in a component are accepted, since objects in the field have them.
#[pyfunction]
pub fn is_uid(text: &Bound<'_, PyString>) -> bool {
    text.to_str().is_ok_and(names::is_uid)
}

/// Whether a file starts like a DICOM object (a Part 10 prefix, or a plausible bare dataset).
#[pyfunction]
pub fn is_dicom(py: Python<'_>, path: OsString) -> PyResult<bool> {
    let path = PathBuf::from(path);
    detached(py, || core::is_dicom(&path))
}
