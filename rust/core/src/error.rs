//! The one error type of the crate: what was expected, what was found, and in which object.
//!
//! A message names an object by its SOPInstanceUID where that is known and by its place in the
//! caller's list where it is not. It never holds any other value of the object, so that no patient's
//! name reaches a log.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What every function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Where the trouble is and what it is.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// SOPInstanceUID of the object, where known.
    pub uid: Option<String>,
    /// Place in the caller's list, where there is one.
    pub place: Option<usize>,
    /// The attribute, where the trouble is in one.
    pub tag: Option<u32>,
    /// What was expected and what was found.
    pub message: String,
}

/// Everything that can go wrong here.
#[derive(Debug)]
pub enum Error {
    /// The operating system refused.
    Io { path: PathBuf, error: io::Error },
    /// Bytes that should be DICOM cannot be understood.
    InvalidDicom(Box<Trouble>),
    /// Values that the wanted output cannot hold.
    InvalidDataset(Box<Trouble>),
    /// Pixels of a kind that cannot be stacked.
    UnsupportedImage(Box<Trouble>),
}

impl Error {
    /// Bytes that cannot be understood.
    pub fn invalid(message: impl Into<String>) -> Self {
        Error::InvalidDicom(Box::new(Trouble {
            message: message.into(),
            ..Trouble::default()
        }))
    }

    /// Bytes that cannot be understood, at one attribute.
    pub fn invalid_at(tag: u32, message: impl Into<String>) -> Self {
        Error::InvalidDicom(Box::new(Trouble {
            tag: Some(tag),
            message: message.into(),
            ..Trouble::default()
        }))
    }

    /// A value that the wanted output cannot hold.
    pub fn unfit(message: impl Into<String>) -> Self {
        Error::InvalidDataset(Box::new(Trouble {
            message: message.into(),
            ..Trouble::default()
        }))
    }

    /// Pixels of a kind that cannot be stacked.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Error::UnsupportedImage(Box::new(Trouble {
            message: message.into(),
            ..Trouble::default()
        }))
    }

    /// A refusal of the operating system, with the path that it was about.
    pub fn io(path: &Path, error: io::Error) -> Self {
        Error::Io {
            path: path.to_path_buf(),
            error,
        }
    }

    /// Add the attribute, unless one is named already.
    pub fn at(mut self, tag: u32) -> Self {
        if let Some(trouble) = self.trouble_mut() {
            trouble.tag.get_or_insert(tag);
        }
        self
    }

    /// Add the SOPInstanceUID, unless one is named already or `uid` is empty.
    pub fn of(mut self, uid: &str) -> Self {
        if let Some(trouble) = self.trouble_mut()
            && trouble.uid.is_none()
            && !uid.is_empty()
        {
            trouble.uid = Some(printable(uid));
        }
        self
    }

    /// Add the place in the caller's list.
    pub fn in_place(mut self, place: usize) -> Self {
        if let Some(trouble) = self.trouble_mut() {
            trouble.place.get_or_insert(place);
        }
        self
    }

    /// The details, for everything that is not a refusal of the operating system.
    pub fn trouble(&self) -> Option<&Trouble> {
        match self {
            Error::Io { .. } => None,
            Error::InvalidDicom(trouble)
            | Error::InvalidDataset(trouble)
            | Error::UnsupportedImage(trouble) => Some(trouble),
        }
    }

    fn trouble_mut(&mut self) -> Option<&mut Trouble> {
        match self {
            Error::Io { .. } => None,
            Error::InvalidDicom(trouble)
            | Error::InvalidDataset(trouble)
            | Error::UnsupportedImage(trouble) => Some(trouble),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io { path, error } => write!(f, "{}: {error}", path.display()),
            Error::InvalidDicom(trouble)
            | Error::InvalidDataset(trouble)
            | Error::UnsupportedImage(trouble) => trouble.fmt(f),
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.uid, self.place) {
            (Some(uid), _) => write!(f, "SOPInstanceUID {uid}: ")?,
            (None, Some(place)) => write!(f, "object {place} of the list: ")?,
            (None, None) => {}
        }
        if let Some(tag) = self.tag {
            write!(f, "({:04X},{:04X})", tag >> 16, tag & 0xFFFF)?;
            match name(tag) {
                "" => write!(f, ": ")?,
                name => write!(f, " {name}: ")?,
            }
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { error, .. } => Some(error),
            _ => None,
        }
    }
}

/// A UID as a message may show it: at most 64 graphic ASCII characters.
fn printable(uid: &str) -> String {
    uid.chars()
        .take(64)
        .map(|c| if c.is_ascii_graphic() { c } else { '?' })
        .collect()
}

/// The keyword of an attribute that this crate reads (PS3.6), empty for others.
fn name(tag: u32) -> &'static str {
    match tag {
        0x0002_0010 => "TransferSyntaxUID",
        0x0008_0008 => "ImageType",
        0x0008_0016 => "SOPClassUID",
        0x0008_0018 => "SOPInstanceUID",
        0x0008_0060 => "Modality",
        0x0018_0050 => "SliceThickness",
        0x0018_0088 => "SpacingBetweenSlices",
        0x0020_000D => "StudyInstanceUID",
        0x0020_000E => "SeriesInstanceUID",
        0x0020_0013 => "InstanceNumber",
        0x0020_0032 => "ImagePositionPatient",
        0x0020_0037 => "ImageOrientationPatient",
        0x0020_0052 => "FrameOfReferenceUID",
        0x0028_0002 => "SamplesPerPixel",
        0x0028_0004 => "PhotometricInterpretation",
        0x0028_0008 => "NumberOfFrames",
        0x0028_0010 => "Rows",
        0x0028_0011 => "Columns",
        0x0028_0030 => "PixelSpacing",
        0x0028_0100 => "BitsAllocated",
        0x0028_0101 => "BitsStored",
        0x0028_0102 => "HighBit",
        0x0028_0103 => "PixelRepresentation",
        0x0028_1052 => "RescaleIntercept",
        0x0028_1053 => "RescaleSlope",
        0x7FE0_0008 => "FloatPixelData",
        0x7FE0_0009 => "DoubleFloatPixelData",
        0x7FE0_0010 => "PixelData",
        _ => "",
    }
}
