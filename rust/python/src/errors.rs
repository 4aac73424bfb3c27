//! The one place where errors of the core become Python exceptions.

use std::panic::{AssertUnwindSafe, catch_unwind};

use dicomnode_core::{Error, Result};
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

/// Run `work` without the interpreter; its errors, and even a panic, become exceptions.
pub fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    told(py, py.detach(|| catch_unwind(AssertUnwindSafe(work))))
}

/// The same with the interpreter, for what takes less time than to let go of it.
pub fn attached<T>(py: Python<'_>, work: impl FnOnce() -> Result<T>) -> PyResult<T> {
    told(py, catch_unwind(AssertUnwindSafe(work)))
}

fn told<T>(py: Python<'_>, outcome: std::thread::Result<Result<T>>) -> PyResult<T> {
    match outcome {
        Ok(outcome) => outcome.map_err(|error| exception(py, error)),
        Err(_) => {
            static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
            let message = "internal error in dicomnode._core, please report it".to_owned();
            Err(raised(py, &CLASS, "DicomnodeError", message))
        }
    }
}

/// The exception for an error of the core.
pub fn exception(py: Python<'_>, error: Error) -> PyErr {
    static INVALID_DICOM: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    static INVALID_DATASET: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    static UNSUPPORTED_IMAGE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let message = error.to_string();
    match error {
        Error::InvalidDicom(_) => raised(py, &INVALID_DICOM, "InvalidDicom", message),
        Error::InvalidDataset(_) => raised(py, &INVALID_DATASET, "InvalidDataset", message),
        Error::UnsupportedImage(_) => raised(py, &UNSUPPORTED_IMAGE, "UnsupportedImage", message),
        Error::Io { path, error } => match error.raw_os_error() {
            // With a number, OSError picks its own subclass, FileNotFoundError for example.
            Some(number) => {
                let text = py
                    .import("os")
                    .and_then(|os| os.call_method1("strerror", (number,)))
                    .and_then(|text| text.extract::<String>());
                match text {
                    Ok(text) => PyOSError::new_err((number, text, path.into_os_string())),
                    Err(failure) => failure,
                }
            }
            None => PyOSError::new_err(message),
        },
    }
}

fn raised(
    py: Python<'_>,
    class: &'static PyOnceLock<Py<PyType>>,
    name: &str,
    message: String,
) -> PyErr {
    match class.import(py, "dicomnode.errors", name) {
        Ok(class) => PyErr::from_type(class.clone(), (message,)),
        Err(failure) => failure,
    }
}
