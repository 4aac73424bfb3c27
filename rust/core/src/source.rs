//! Where the bytes of an object are: a file that is read in place, or memory that is borrowed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result};

/// One object, whole.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// Path of a file.
    File(&'a Path),
    /// The object itself.
    Bytes(&'a [u8]),
}

/// Open a file and tell its size; what is not a regular file is not DICOM.
pub(crate) fn open(path: &Path) -> Result<(File, u64)> {
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let meta = file.metadata().map_err(|error| Error::io(path, error))?;
    if meta.is_dir() {
        // Reading a folder fails with the operating system's own error, which names it best.
        read_at(&file, path, 0, &mut [0])?;
    }
    if !meta.is_file() {
        return Err(Error::invalid(format!(
            "{} is not a regular file",
            path.display()
        )));
    }
    Ok((file, meta.len()))
}

/// Read at an offset until `into` is full or the file ends; how much was read.
pub(crate) fn read_at(file: &File, path: &Path, offset: u64, into: &mut [u8]) -> Result<usize> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io(path, error)),
        }
    }
    Ok(done)
}
