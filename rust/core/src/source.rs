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

impl<'a> Source<'a> {
    /// Open it for random access.
    pub fn open(self) -> Result<Opened<'a>> {
        match self {
            Source::Bytes(bytes) => Ok(Opened::Bytes(bytes)),
            Source::File(path) => {
                let (file, size) = open(path)?;
                Ok(Opened::File { file, path, size })
            }
        }
    }
}

/// A source that can be read at any place.
#[derive(Debug)]
pub enum Opened<'a> {
    File {
        file: File,
        path: &'a Path,
        size: u64,
    },
    Bytes(&'a [u8]),
}

impl<'a> Opened<'a> {
    /// Bytes in all.
    pub fn size(&self) -> u64 {
        match self {
            Opened::File { size, .. } => *size,
            Opened::Bytes(bytes) => bytes.len() as u64,
        }
    }

    /// Fill `into` from `offset`.
    ///
    /// Errors: [`Error::InvalidDicom`] where the source ends before; [`Error::Io`].
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        match self {
            Opened::Bytes(_) => {
                let bytes = self.borrow(offset, into.len());
                into.copy_from_slice(bytes.ok_or_else(|| ended(offset))?);
            }
            Opened::File { file, path, .. } => {
                if read_at(file, path, offset, into)? < into.len() {
                    return Err(ended(offset));
                }
            }
        }
        Ok(())
    }

    /// A part of a source in memory; None for a file, and where the source ends before.
    pub fn borrow(&self, offset: u64, length: usize) -> Option<&'a [u8]> {
        match self {
            Opened::Bytes(bytes) => {
                let start = usize::try_from(offset).ok()?;
                bytes.get(start..start.checked_add(length)?)
            }
            Opened::File { .. } => None,
        }
    }
}

pub(crate) fn ended(offset: u64) -> Error {
    Error::invalid(format!(
        "expected more bytes at offset {offset}, found the end"
    ))
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
