//! JPEG with 8 and 12 bits, lossy and lossless (ISO 10918-1), with libjpeg-turbo.

use std::ffi::{CStr, c_int};
use std::ptr::NonNull;

use turbojpeg_sys as ffi;

use super::{Decoded, Shape, Wish, broken, other_colors};
use crate::color::Space;
use crate::error::Result;

/// Most scans of a progressive image; a hostile one has many, each as long as the image.
const MAX_SCANS: c_int = 200;

/// What a JPEG or JPEG-LS says of itself before its first scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Start {
    pub marker: u8,
    pub precision: u32,
    pub rows: u32,
    pub columns: u32,
    pub components: u32,
    /// The first scan has one component of several.
    pub is_planar: bool,
    /// Where the first scan's marker is.
    scan: usize,
    /// What the first three components are called.
    names: [u8; 3],
    /// Where a JFIF marker is.
    jfif: Option<usize>,
    /// The transform that an Adobe marker tells.
    adobe: Option<u8>,
}

impl Start {
    fn is_lossless(&self) -> bool {
        self.marker == 0xC3
    }

    /// What the codestream itself says of its colours.
    ///
    /// A lossless JPEG is no JFIF, even where it says so.
    fn said(&self) -> Option<Space> {
        match self.adobe {
            _ if self.components != 3 => None,
            _ if self.jfif.is_some() && !self.is_lossless() => Some(Space::Ybr),
            Some(0) => Some(Space::Rgb),
            Some(1) => Some(Space::Ybr),
            _ if self.names == *b"RGB" => Some(Space::Rgb),
            _ => None,
        }
    }

    /// The image with markers that make the decoder convert to RGB, or leave the samples alone.
    fn told(&self, frame: &[u8], convert: bool) -> Option<Vec<u8>> {
        let (before, after) = frame.split_at_checked(self.scan)?;
        let transform = u8::from(convert);
        let adobe = [b"\xFF\xEE\0\x0EAdobe\0\x64\0\0\0\0", [transform].as_slice()].concat();
        let mut told = [before, &adobe, after].concat();
        // The last Adobe marker counts, but a JFIF marker counts more.
        if let Some(name) = self.jfif
            && let Some(name) = told.get_mut(name..name + 4)
        {
            name.copy_from_slice(b"none");
        }
        Some(told)
    }

    /// The image with the parameters of its scan set right, where a sequential one has others
    /// than it may (ISO 10918-1 table B.3). They have no influence, but a decoder tells only its
    /// first warning, and this one must not hide another.
    fn odd_spectrum(&self, frame: &[u8]) -> Option<Vec<u8>> {
        if !matches!(self.marker, 0xC0 | 0xC1) {
            return None;
        }
        let in_scan = usize::from(*frame.get(self.scan + 4)?);
        let at = self.scan + 5 + 2 * in_scan;
        let right = [0, 63, 0];
        if frame.get(at..at + 3)? == right {
            return None;
        }
        let mut patched = frame.to_vec();
        patched.get_mut(at..at + 3)?.copy_from_slice(&right);
        Some(patched)
    }
}

/// Read the markers up to the first scan (ISO 10918-1 annex B).
pub(super) fn start_of_frame(frame: &[u8]) -> Result<Start> {
    let damaged = || broken("the JPEG has no whole header");
    let mut start: Option<Start> = None;
    let (mut jfif, mut adobe) = (None, None);
    let mut at = 2;
    loop {
        let rest = frame.get(at..).ok_or_else(damaged)?;
        let [0xFF, marker, rest @ ..] = rest else {
            return Err(damaged());
        };
        match marker {
            // Fill bytes before a marker.
            0xFF => {
                at += 1;
                continue;
            }
            0x01 | 0xD0..=0xD8 => {
                at += 2;
                continue;
            }
            _ => {}
        }
        let [high, low, body @ ..] = rest else {
            return Err(damaged());
        };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let body = length.checked_sub(2).and_then(|length| body.get(..length));
        let body = body.ok_or_else(damaged)?;
        match marker {
            0xDA => {
                let mut start = start.ok_or_else(damaged)?;
                (start.scan, start.jfif, start.adobe) = (at, jfif, adobe);
                let in_scan = body.first().copied().ok_or_else(damaged)?;
                start.is_planar = start.components > 1 && in_scan == 1;
                return Ok(start);
            }
            0xE0 if body.starts_with(b"JFIF\0") => jfif = Some(at + 4),
            0xEE if body.starts_with(b"Adobe") => adobe = body.get(11).copied(),
            0xD9 => return Err(damaged()),
            0xF7 | 0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF => {
                let [precision, r1, r0, c1, c0, components, table @ ..] = body else {
                    return Err(damaged());
                };
                let name = |k: usize| table.get(3 * k).copied().unwrap_or(0);
                if start.is_some() {
                    return Err(broken("the JPEG has several frame headers"));
                }
                start = Some(Start {
                    marker: *marker,
                    precision: u32::from(*precision),
                    rows: u32::from(u16::from_be_bytes([*r1, *r0])),
                    columns: u32::from(u16::from_be_bytes([*c1, *c0])),
                    components: u32::from(*components),
                    is_planar: false,
                    scan: 0,
                    names: [name(0), name(1), name(2)],
                    jfif: None,
                    adobe: None,
                });
            }
            _ => {}
        }
        at += 2 + length;
    }
}

pub(super) fn decode(frame: &[u8], shape: Shape, wish: Wish, into: &mut Decoded) -> Result<()> {
    let start = start_of_frame(frame)?;
    shape.check(start.rows, start.columns, start.components)?;
    let format = match start.components {
        1 => ffi::TJPF_TJPF_GRAY,
        3 => ffi::TJPF_TJPF_RGB,
        found => {
            return Err(crate::Error::unsupported(format!(
                "expected a JPEG of 1 or 3 components, found {found}"
            )));
        }
    };
    // Without a word from the codestream the header decides.
    let space = start.said().unwrap_or(wish.space);
    if space != wish.space {
        into.note = Some(other_colors(space));
    }
    let convert = wish.rgb && space == Space::Ybr && !start.is_lossless();
    into.space = if convert { Space::Rgb } else { space };
    if !(2..=16).contains(&start.precision) {
        let found = start.precision;
        return Err(broken(format!(
            "expected 2 to 16 bits in a JPEG, found {found}"
        )));
    }
    match start.marker {
        // A sample or a block of 64 has at least a bit; a component may have a quarter of them.
        0xC3 => shape.check_held(frame, 8 * 4)?,
        0xC0..=0xC2 => shape.check_held(frame, 8 * 4 * 64)?,
        // Arithmetic coding has no such limit.
        _ => {}
    }
    let patched;
    let frame = match start.odd_spectrum(frame) {
        Some(bytes) => {
            patched = bytes;
            patched.as_slice()
        }
        None => frame,
    };
    // What the decoder would do of its own accord.
    let guess = start.said().unwrap_or(Space::Ybr) == Space::Ybr;
    let told = if start.components == 3 && (convert != guess || start.is_lossless()) {
        start.told(frame, convert)
    } else {
        None
    };
    let frame = told.as_deref().unwrap_or(frame);
    let decoder = match into.jpeg.take() {
        Some(decoder) => decoder,
        None => Decoder::new()?,
    };
    let cells = into.prepare(shape.samples_of_frame()?, start.precision)?;
    let outcome = decoder.decode(frame, start, format, cells);
    into.jpeg = Some(decoder);
    outcome
}

/// A decoder, used for one frame after the other.
#[derive(Debug)]
pub(super) struct Decoder {
    handle: NonNull<std::ffi::c_void>,
}

impl Decoder {
    fn new() -> Result<Self> {
        let kind = ffi::TJINIT_TJINIT_DECOMPRESS.cast_signed();
        // SAFETY: takes a number; a null result is handled.
        let handle = NonNull::new(unsafe { ffi::tj3Init(kind) })
            .ok_or_else(|| broken("no memory for a JPEG decoder"))?;
        let decoder = Decoder { handle };
        decoder.set(ffi::TJPARAM_TJPARAM_SCANLIMIT, MAX_SCANS)?;
        Ok(decoder)
    }

    fn set(&self, parameter: ffi::TJPARAM, value: c_int) -> Result<()> {
        // SAFETY: the handle is live.
        match unsafe { ffi::tj3Set(self.handle.as_ptr(), parameter as c_int, value) } {
            0 => Ok(()),
            _ => Err(self.error()),
        }
    }

    fn get(&self, parameter: ffi::TJPARAM) -> Option<u32> {
        // SAFETY: the handle is live.
        let found = unsafe { ffi::tj3Get(self.handle.as_ptr(), parameter as c_int) };
        u32::try_from(found).ok()
    }

    /// Decode to cells of 8 bits, or of 16 where the precision is above 8.
    ///
    /// `cells` is aligned for 16 bits and holds all samples of the frame.
    fn decode(&self, frame: &[u8], start: Start, format: c_int, cells: &mut [u8]) -> Result<()> {
        let (handle, size) = (self.handle.as_ptr(), frame.len() as ffi::size_t);
        // SAFETY: the handle is live; the frame is `size` bytes long.
        let found = unsafe { ffi::tj3DecompressHeader(handle, frame.as_ptr(), size) };
        self.checked(found)?;
        // What the decoder will write is decided by its own reading of the header.
        for (parameter, expected) in [
            (ffi::TJPARAM_TJPARAM_JPEGWIDTH, start.columns),
            (ffi::TJPARAM_TJPARAM_JPEGHEIGHT, start.rows),
            (ffi::TJPARAM_TJPARAM_PRECISION, start.precision),
        ] {
            if self.get(parameter) != Some(expected) {
                return Err(broken("the JPEG contradicts itself"));
            }
        }
        let into = cells.as_mut_ptr();
        // SAFETY: the handle is live and has read the header of this very frame, whose width and
        // height are those that `cells` was made for; the pitch 0 means rows without a gap; cells
        // of 16 bits are aligned by `Buffer`.
        let found = unsafe {
            match start.precision {
                0..=8 => ffi::tj3Decompress8(handle, frame.as_ptr(), size, into, 0, format),
                9..=12 => {
                    ffi::tj3Decompress12(handle, frame.as_ptr(), size, into.cast(), 0, format)
                }
                _ => ffi::tj3Decompress16(handle, frame.as_ptr(), size, into.cast(), 0, format),
            }
        };
        self.checked(found)
    }

    fn checked(&self, found: c_int) -> Result<()> {
        // The decoder warns, makes up what is missing, and tells the first warning only. Harmless is
        // what lies between the image and its end, after which no other warning can come.
        let is_harmless = || self.is_warning() && self.text().ends_with("before marker 0xd9");
        if found == 0 || is_harmless() {
            return Ok(());
        }
        Err(self.error())
    }

    fn is_warning(&self) -> bool {
        // SAFETY: the handle is live.
        let found = unsafe { ffi::tj3GetErrorCode(self.handle.as_ptr()) };
        found == ffi::TJERR_TJERR_WARNING.cast_signed()
    }

    fn text(&self) -> String {
        // SAFETY: the handle is live; the text lives until the next call and is copied.
        let text = unsafe { CStr::from_ptr(ffi::tj3GetErrorStr(self.handle.as_ptr())) };
        text.to_string_lossy().into_owned()
    }

    fn error(&self) -> crate::Error {
        broken(format!("the JPEG is damaged: {}", self.text()))
    }
}

// SAFETY: a handle has no ties to the thread that made it, and only one thread has it at a time.
unsafe impl Send for Decoder {}

impl Drop for Decoder {
    fn drop(&mut self) {
        // SAFETY: the handle is live and not used again.
        unsafe { ffi::tj3Destroy(self.handle.as_ptr()) };
    }
}
