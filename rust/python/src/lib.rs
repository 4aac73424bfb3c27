//! The compiled module `dicomnode._core`: converts, calls, converts.
//!
//! The problem: the core takes slices and paths and returns Rust values; Python has objects whose
//! memory may go away. This crate borrows the memory of Python objects for as long as it is used,
//! detaches from the interpreter around every loop, and turns errors into the exceptions of
//! `dicomnode.errors`. Its typed face is `python/dicomnode/_core.pyi`.

mod codecs;
mod digest;
mod errors;
mod header;
mod image;
mod journal;
mod memory;
mod receive;

#[pyo3::pymodule]
mod _core {
    use pyo3::prelude::*;
    use pyo3::types::{PyBytes, PyString};

    #[pymodule_export]
    use crate::codecs::{codecs, jpeg_has_simd};
    #[pymodule_export]
    use crate::digest::digest;
    #[pymodule_export]
    use crate::header::{Header, is_dicom, is_uid, scan};
    #[pymodule_export]
    use crate::image::{Image, load, scan_images, stack};
    #[pymodule_export]
    use crate::journal::{JournalFile, filesystem_type, sync_filesystem};
    #[pymodule_export]
    use crate::receive::{Received, Receiver, link, part10_prefix};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let py = module.py();
        module.add(
            "Source",
            py.get_type::<PyString>().bitor(py.get_type::<PyBytes>())?,
        )?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("debug_build", cfg!(debug_assertions))
    }
}
