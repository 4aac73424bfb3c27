//! Where the bytes of an object are: a file that is read in place, or memory that is borrowed.

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileExt, MetadataExt};
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
                let (file, stamp) = open(path)?;
                Ok(Opened::File { file, path, stamp })
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
        stamp: Stamp,
    },
    Bytes(&'a [u8]),
}

impl<'a> Opened<'a> {
    /// Bytes in all.
    pub fn size(&self) -> u64 {
        match self {
            Opened::File { stamp, .. } => stamp.size,
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

/// What the operating system tells of one state of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub(crate) size: u64,
    device: u64,
    inode: u64,
    /// Nanoseconds since 1970 when the content, and when the content or anything else, was changed.
    modified: i64,
    changed: i64,
}

impl Stamp {
    /// The state of a file now.
    pub(crate) fn now(path: &Path) -> Result<Self> {
        let meta = path.metadata().map_err(|error| Error::io(path, error))?;
        Ok(Stamp::new(&meta))
    }

    fn new(meta: &Metadata) -> Self {
        let nanoseconds = |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000) + rest;
        Stamp {
            size: meta.len(),
            device: meta.dev(),
            inode: meta.ino(),
            modified: nanoseconds(meta.mtime(), meta.mtime_nsec()),
            changed: nanoseconds(meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// Whether the file was last changed so long before `time` (nanoseconds since 1970) that a later
    /// change has another stamp: file systems count in steps of up to two seconds.
    pub(crate) fn is_older_than(&self, time: i64) -> bool {
        time.saturating_sub(self.changed.max(self.modified)) > 2_000_000_000
    }

    /// Whether the content seems to be the same. Links to a file may come and go meanwhile, and
    /// some network file systems number files anew.
    pub(crate) fn is_same_content(&self, other: &Stamp) -> bool {
        (self.size, self.modified) == (other.size, other.modified)
    }
}

pub(crate) fn ended(offset: u64) -> Error {
    Error::invalid(format!(
        "expected more bytes at offset {offset}, found the end"
    ))
}

/// Open a file and tell its state; what is not a regular file is not DICOM.
pub(crate) fn open(path: &Path) -> Result<(File, Stamp)> {
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
    Ok((file, Stamp::new(&meta)))
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
