//! `JournalFile`: small images that are flushed together.

use std::ffi::c_int;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use dicomnode_core::Error;
use dicomnode_core::incoming::Flush;
use dicomnode_core::journal::{self as core, Answer, Kept, NONCE, Naming};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use rustix::fs::{fstatfs, syncfs};

use crate::errors::detached;
use crate::receive::Received;

/// A file that keeps records one behind another; `append` may be called by several threads at a time.
///
/// They go to the open file from `start` on, each begins with `nonce`, of 16 bytes, and none ends behind `size`. With `flush`
/// they survive a power cut. The file is duplicated.
#[pyclass(frozen, module = "dicomnode._core")]
pub struct JournalFile(core::JournalFile);

#[pymethods]
impl JournalFile {
    #[new]
    fn new(
        descriptor: c_int,
        nonce: [u8; NONCE],
        start: u64,
        size: u64,
        flush: bool,
    ) -> PyResult<Self> {
        let file = borrowed(descriptor)?.try_clone_to_owned()?;
        let made = core::JournalFile::new(file, nonce, start, size, flush);
        Ok(JournalFile(made))
    }

    /// Keep a text.
    ///
    /// What comes at the same time is flushed at once. False, and nothing is done, where it does not fit; else `settle` has
    /// to be called in the end. Raises OSError.
    fn append(&self, py: Python<'_>, text: &str) -> PyResult<bool> {
        detached(py, || {
            let record = self.0.record(text.as_bytes(), None);
            record
                .and_then(|record| self.0.append(&record))
                .map_err(|error| Error::io(Path::new("journal"), error))
        })
    }

    /// Give an open file of `size` bytes a name in a folder as `link` does, keep a text and with `with_image` the file, and then,
    /// if it `is_awaited`, answer the request with 0x0000: all without the interpreter. Each NUL of the text becomes
    /// the digest of the request, which need not be there before the name is.
    ///
    /// Where records survive a power cut and this one has not the file, file and name are flushed; the name is not where
    /// the request has the `name_ahead` that is given, which then stays.
    ///
    /// False, and nothing is done, where the name is taken, and None where the record does not fit. Otherwise `settle` has
    /// to be called in the end. Raises OSError, where nothing is left of it.
    #[expect(clippy::too_many_arguments, reason = "they have names in Python")]
    #[pyo3(signature = (text, descriptor, size, with_image, folder, name, request = None, is_awaited = false, name_ahead = None))]
    fn keep(
        &self,
        py: Python<'_>,
        text: &str,
        descriptor: c_int,
        size: usize,
        with_image: bool,
        folder: PathBuf,
        name: &str,
        request: Option<Bound<'_, Received>>,
        is_awaited: bool,
        name_ahead: Option<&str>,
    ) -> PyResult<Option<bool>> {
        let opened = borrowed(descriptor)?;
        let request = request.as_ref().map(Bound::get);
        detached(py, || {
            let image = with_image.then_some((opened, size));
            let ahead = name_ahead.zip(request);
            let flush = if with_image || !self.0.is_flushed() {
                Flush::Nothing
            } else if ahead.is_some_and(|(name, request)| request.is_named(name)) {
                Flush::File
            } else {
                Flush::All
            };
            let naming = Naming {
                opened,
                size: size as u64,
                folder: &folder,
                name,
                flush,
            };
            let digests = text.bytes().filter(|byte| *byte == 0).count();
            let longer = digests * request.map_or(0, |one| 2 * one.digest_size() - 1);
            let reply = request.filter(|_| is_awaited).map(Received::reply);
            let answer = reply
                .clone()
                .map(|reply| -> Answer { Box::new(move || reply.give(0, "", 0)) });
            let kept = core::JournalFile::length(text.len() + longer, image.map_or(0, |_| size))
                .and_then(|length| {
                    let make = || match request {
                        Some(request) if digests > 0 => {
                            let text = text.replace('\0', &request.digest_text());
                            self.0.record(text.as_bytes(), image)
                        }
                        _ => self.0.record(text.as_bytes(), image),
                    };
                    let meanwhile = || {
                        if let Some(reply) = &reply {
                            reply.read_ahead();
                        }
                    };
                    self.0.keep(length, &naming, make, answer, meanwhile)
                });
            match kept.map_err(|error| Error::io(Path::new(name), error))? {
                Kept::Full => Ok(None),
                Kept::NameTaken => Ok(Some(false)),
                Kept::Whole => {
                    if let Some(request) = request.filter(|_| flush == Flush::File) {
                        request.keep_name_ahead();
                    }
                    Ok(Some(true))
                }
            }
        })
    }

    /// Whether a write or flush of it has failed, so that it keeps nothing any more.
    #[getter]
    fn has_failed(&self) -> bool {
        self.0.has_failed()
    }

    /// What has to happen after a record was kept, and before its file is let go, has happened.
    fn settle(&self) {
        self.0.settle();
    }

    /// Let nothing more fit, and wait until all that did has settled or has failed.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || {
            self.0.finish();
            Ok(())
        })
    }
}

/// Have the disk keep all that was written to the file system of an open file or folder.
///
/// An error of any of it, since that was opened, shows once. Raises OSError.
#[pyfunction]
pub fn sync_filesystem(py: Python<'_>, descriptor: c_int) -> PyResult<()> {
    let opened = borrowed(descriptor)?;
    detached(py, || {
        syncfs(opened).map_err(|error| Error::io(Path::new("file system"), error.into()))
    })
}

/// What kind of file system an open file or folder is on: `f_type` of statfs(). Raises OSError.
#[pyfunction]
pub fn filesystem_type(descriptor: c_int) -> PyResult<i64> {
    let found = fstatfs(borrowed(descriptor)?).map_err(std::io::Error::from)?;
    Ok(found.f_type as i64)
}

/// An open descriptor, which the caller keeps open meanwhile.
fn borrowed<'a>(descriptor: c_int) -> PyResult<BorrowedFd<'a>> {
    if descriptor < 0 {
        return Err(PyValueError::new_err("expected an open descriptor"));
    }
    // SAFETY: the caller keeps it open.
    Ok(unsafe { BorrowedFd::borrow_raw(descriptor) })
}
