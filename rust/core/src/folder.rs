//! The DICOM objects in files and folders.
//!
//! The problem: a folder holds images, and what else people put there. What is no image must not stop
//! a series from being read, and an image that is damaged must: a series without it would be another
//! examination. Each file is scanned once, for that and for the attributes that stacking needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::image::{Image, image_of, text_of};
use crate::scan::{self, Kept};
use crate::source::Source;
use crate::stack::parallel;

/// Directory Record Sequence (PS3.3 F.3.2.2), which only a DICOMDIR has.
const DIRECTORY_RECORDS: u32 = 0x0004_1220;
const MEDIA_STORAGE_DIRECTORY: &str = "1.2.840.10008.1.3.10";
/// What images are called.
const SUFFIXES: [&str; 3] = ["dcm", "dicom", "ima"];
/// Bytes up to the end of `DICM` (PS3.10 section 7.1).
const PREFIX: usize = 132;

/// A file that may be an object.
#[derive(Debug)]
pub struct Candidate {
    pub path: PathBuf,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Given by its own name.
    Named,
    /// Found in a folder.
    Found,
    /// Found, and its name or that of a folder above it, below the given one, starts with a dot.
    Hidden,
}

/// What a file turned out to be.
#[derive(Debug)]
pub enum Found {
    /// An object, and its image attributes as long as its file stays as it is.
    Image(Box<Image>),
    /// An object whose attributes have to be read again when they are needed.
    Object,
    /// A DICOMDIR (PS3.10 section 8.6).
    Directory,
    /// Something else.
    Other,
}

/// The file given, or all files in the folder given and below it, in the order of their names: those
/// of a folder, then those of each folder in it.
///
/// Links to folders are not followed; pipes, sockets and devices are left out.
///
/// Errors: [`Error::Io`]; [`Error::InvalidDicom`] for a given one that is neither file nor folder.
pub fn candidates(given: &Path) -> Result<Vec<Candidate>> {
    let meta = given.metadata().map_err(|error| Error::io(given, error))?;
    let mut files = Vec::new();
    if meta.is_file() {
        let (path, kind) = (given.to_path_buf(), Kind::Named);
        files.push(Candidate { path, kind });
    } else if meta.is_dir() {
        let mut folders = vec![(given.to_path_buf(), Kind::Found)];
        while let Some((folder, kind)) = folders.pop() {
            let inner = list(&folder, kind, &mut files)?;
            folders.extend(inner.into_iter().rev());
        }
    } else {
        let path = given.display();
        return Err(Error::invalid(format!("{path} is not a regular file")));
    }
    Ok(files)
}

/// The folders in a folder, by name; its files are added to `files`.
fn list(folder: &Path, kind: Kind, files: &mut Vec<Candidate>) -> Result<Vec<(PathBuf, Kind)>> {
    let failed = |error| Error::io(folder, error);
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        entries.push((entry.file_name(), entry.file_type().map_err(failed)?));
    }
    entries.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    let mut folders = Vec::new();
    for (name, is) in entries {
        let kind = match name.as_encoded_bytes() {
            [b'.', ..] => Kind::Hidden,
            _ => kind,
        };
        // As a user would write it.
        let path = if folder == Path::new(".") {
            PathBuf::from(name)
        } else {
            folder.join(name)
        };
        if is.is_dir() {
            folders.push((path, kind));
        } else if is.is_file() || (is.is_symlink() && is_file_or_broken(&path)) {
            files.push(Candidate { path, kind });
        }
    }
    Ok(folders)
}

/// A link that leads nowhere stands for a file that is missing: opening it tells.
fn is_file_or_broken(link: &Path) -> bool {
    link.metadata().map_or(true, |meta| meta.is_file())
}

/// Scan files in parallel; the outcomes in their order, or the first error. Images keep the values of
/// `extra_tags`.
///
/// Errors: [`Error::InvalidDicom`] for a damaged object, for an empty file that is called like an
/// image, and for a file given by name that is no object; [`Error::Io`].
/// See [`is_lost_image`] for what is called like one.
pub fn scan_files(files: &[Candidate], extra_tags: &[u32]) -> Result<Vec<Found>> {
    let extra_tags: Arc<[u32]> = extra_tags.into();
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| i64::try_from(now.as_nanos()).unwrap_or(i64::MAX));
    parallel(
        files.iter(),
        files.len() / 16,
        Vec::new,
        |buffer, file| match scan_file(file, &extra_tags, buffer, now) {
            Err(error @ Error::InvalidDicom(_)) => refused(file, error),
            other => other,
        },
    )
}

fn scan_file(
    file: &Candidate,
    extra_tags: &Arc<[u32]>,
    buffer: &mut Vec<u8>,
    now: i64,
) -> Result<Found> {
    scan::scan_with(Source::File(&file.path), None, buffer, |layout, kept| {
        if file.kind != Kind::Named {
            let has_records = layout.find(DIRECTORY_RECORDS).is_some();
            let sop_class = text_of(&layout, &kept, 0x0008_0016);
            if has_records || sop_class.is_ok_and(|uid| uid == MEDIA_STORAGE_DIRECTORY) {
                return Ok(Found::Directory);
            }
        }
        if let Kept::Inflated(_) = kept {
            // Too large to keep, and not worth inflating twice.
            return Ok(Found::Object);
        }
        // What cannot be understood is told by whoever needs it.
        Ok(match image_of(&layout, &kept, extra_tags) {
            Ok(image) if image.stamp.is_some_and(|stamp| stamp.is_older_than(now)) => {
                Found::Image(Box::new(image))
            }
            _ => Found::Object,
        })
    })
}

/// What to do about a file that is no DICOM object.
fn refused(file: &Candidate, error: Error) -> Result<Found> {
    let path = file.path.display();
    if file.kind == Kind::Named {
        return Err(Error::invalid(format!("{path}: {error}")));
    }
    if scan::is_dicom(&file.path)? || (file.kind == Kind::Found && is_lost_image(&file.path)?) {
        return Err(Error::invalid(format!(
            "{path} is damaged: {error}; a series is not read without it: send or copy it again, or \
             take it out of the folder"
        )));
    }
    Ok(Found::Other)
}

/// Whether a file that is no DICOM object was one: it is called so, or has no suffix, which many images
/// have not, and is empty or filled with one byte, as a full disk or a crash leave it.
fn is_lost_image(path: &Path) -> Result<bool> {
    let suffix = path.extension().unwrap_or_default();
    if SUFFIXES.iter().any(|one| suffix.eq_ignore_ascii_case(one)) {
        return Ok(true);
    }
    if !suffix.is_empty() {
        return Ok(false);
    }
    let opened = Source::File(path).open()?;
    let size = opened.size().min(PREFIX as u64) as usize;
    let mut start = [0; PREFIX];
    let start = start.get_mut(..size).unwrap_or_default();
    opened.read(0, start)?;
    let is_filled = |byte: u8| start.iter().all(|found| *found == byte);
    Ok(is_filled(0) || is_filled(0xFF))
}
