//! Codecs: one compressed frame to its samples.
//!
//! The problem: a dozen compressed transfer syntaxes (PS3.5 annex A.4), decoders that believe what
//! the bytes say about themselves, and headers that say something else. Here each frame is checked
//! against the header before it is decoded, decoded into a buffer that is reused from frame to
//! frame, and described by what the codestream itself says: how many bits a sample has, and whether
//! it is signed.
//!
//! Which decoder reads a codestream is told by the codestream's own start, not by the transfer
//! syntax: the JPEG family is mislabelled often enough.

mod deflated;
mod jpeg;
mod jpeg2000;
mod jpeg_ls;
mod jpeg_xl;
mod rle;

use crate::color::Space;
use crate::error::{Error, Result};
use crate::scan::PIXEL_DATA;

/// What compresses the frames of a transfer syntax.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Not compressed, but in fragments.
    Plain,
    Deflated,
    Rle,
    Jpeg,
    JpegLs,
    Jpeg2000,
    JpegXl,
}

/// A transfer syntax with encapsulated or absent pixel data: UID, name, and what decodes it.
pub type Syntax = (&'static str, &'static str, Option<Codec>);

/// The encapsulated transfer syntaxes of PS3.6 annex A; None for those that are not decoded.
pub const SYNTAXES: &[Syntax] = &[
    (
        "1.2.840.10008.1.2.1.98",
        "Encapsulated Uncompressed Explicit VR Little Endian",
        Some(Codec::Plain),
    ),
    (
        "1.2.840.10008.1.2.8.1",
        "Deflated Image Frame Compression",
        Some(Codec::Deflated),
    ),
    ("1.2.840.10008.1.2.5", "RLE Lossless", Some(Codec::Rle)),
    (
        "1.2.840.10008.1.2.4.50",
        "JPEG Baseline (Process 1)",
        Some(Codec::Jpeg),
    ),
    (
        "1.2.840.10008.1.2.4.51",
        "JPEG Extended (Process 2 and 4)",
        Some(Codec::Jpeg),
    ),
    (
        "1.2.840.10008.1.2.4.57",
        "JPEG Lossless, Non-Hierarchical (Process 14)",
        Some(Codec::Jpeg),
    ),
    (
        "1.2.840.10008.1.2.4.70",
        "JPEG Lossless, Non-Hierarchical, First-Order Prediction",
        Some(Codec::Jpeg),
    ),
    (
        "1.2.840.10008.1.2.4.80",
        "JPEG-LS Lossless",
        Some(Codec::JpegLs),
    ),
    (
        "1.2.840.10008.1.2.4.81",
        "JPEG-LS Lossy (Near-Lossless)",
        Some(Codec::JpegLs),
    ),
    (
        "1.2.840.10008.1.2.4.90",
        "JPEG 2000 (Lossless Only)",
        Some(Codec::Jpeg2000),
    ),
    ("1.2.840.10008.1.2.4.91", "JPEG 2000", Some(Codec::Jpeg2000)),
    (
        "1.2.840.10008.1.2.4.201",
        "High-Throughput JPEG 2000 (Lossless Only)",
        Some(Codec::Jpeg2000),
    ),
    (
        "1.2.840.10008.1.2.4.202",
        "High-Throughput JPEG 2000 with RPCL Options (Lossless Only)",
        Some(Codec::Jpeg2000),
    ),
    (
        "1.2.840.10008.1.2.4.203",
        "High-Throughput JPEG 2000",
        Some(Codec::Jpeg2000),
    ),
    (
        "1.2.840.10008.1.2.4.110",
        "JPEG XL Lossless",
        Some(Codec::JpegXl),
    ),
    (
        "1.2.840.10008.1.2.4.111",
        "JPEG XL JPEG Recompression",
        Some(Codec::JpegXl),
    ),
    ("1.2.840.10008.1.2.4.112", "JPEG XL", Some(Codec::JpegXl)),
    (
        "1.2.840.10008.1.2.4.92",
        "JPEG 2000 Part 2 Multi-component (Lossless Only)",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.93",
        "JPEG 2000 Part 2 Multi-component",
        None,
    ),
    ("1.2.840.10008.1.2.4.94", "JPIP Referenced", None),
    ("1.2.840.10008.1.2.4.95", "JPIP Referenced Deflate", None),
    ("1.2.840.10008.1.2.4.204", "JPIP HTJ2K Referenced", None),
    (
        "1.2.840.10008.1.2.4.205",
        "JPIP HTJ2K Referenced Deflate",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.100",
        "MPEG2 Main Profile / Main Level",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.100.1",
        "Fragmentable MPEG2 Main Profile / Main Level",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.101",
        "MPEG2 Main Profile / High Level",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.101.1",
        "Fragmentable MPEG2 Main Profile / High Level",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.102",
        "MPEG-4 AVC/H.264 High Profile / Level 4.1",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.102.1",
        "Fragmentable MPEG-4 AVC/H.264 High Profile / Level 4.1",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.103",
        "MPEG-4 AVC/H.264 BD-compatible High Profile / Level 4.1",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.103.1",
        "Fragmentable MPEG-4 AVC/H.264 BD-compatible High Profile / Level 4.1",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.104",
        "MPEG-4 AVC/H.264 High Profile / Level 4.2 For 2D Video",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.104.1",
        "Fragmentable MPEG-4 AVC/H.264 High Profile / Level 4.2 For 2D Video",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.105",
        "MPEG-4 AVC/H.264 High Profile / Level 4.2 For 3D Video",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.105.1",
        "Fragmentable MPEG-4 AVC/H.264 High Profile / Level 4.2 For 3D Video",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.106",
        "MPEG-4 AVC/H.264 Stereo High Profile / Level 4.2",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.106.1",
        "Fragmentable MPEG-4 AVC/H.264 Stereo High Profile / Level 4.2",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.107",
        "HEVC/H.265 Main Profile / Level 5.1",
        None,
    ),
    (
        "1.2.840.10008.1.2.4.108",
        "HEVC/H.265 Main 10 Profile / Level 5.1",
        None,
    ),
];

/// What decodes the encapsulated frames of a transfer syntax.
///
/// Errors: [`Error::UnsupportedImage`] that names the syntax.
pub fn codec_of(transfer_syntax: &str) -> Result<Codec> {
    let known = SYNTAXES.iter().find(|(uid, ..)| *uid == transfer_syntax);
    match known {
        Some((.., Some(codec))) => Ok(*codec),
        Some((uid, name, None)) => Err(Error::unsupported(format!(
            "images in {name} ({uid}) are not decoded; send them in another transfer syntax"
        ))),
        None => Err(Error::unsupported(format!(
            "expected fragments in an encapsulated transfer syntax, found them in {transfer_syntax}"
        ))),
    }
}

/// Samples of a frame that is larger than those of any device, 16384 x 16384.
const LARGE_SAMPLES: usize = 1 << 28;
/// Samples of such a frame for each of its bytes, above which it is no image.
const LARGE_RATIO: usize = 1 << 15;

/// What the header says of one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub rows: u32,
    pub columns: u32,
    pub samples: u32,
    pub bits_allocated: u32,
}

/// What the header says of colours, and whether RGB is wanted where a codestream can give it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wish {
    pub space: Space,
    pub rgb: bool,
}

impl Codec {
    /// What decodes it: a name, its licence, and the crate that brings it; no crate for our own.
    pub fn origin(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Codec::Plain => ("dicomnode", "MIT", ""),
            Codec::Rle => ("dicomnode", "MIT", ""),
            Codec::Deflated => ("zlib-rs", "Zlib", "zlib-rs"),
            Codec::Jpeg => ("libjpeg-turbo", "IJG, BSD-3-Clause", "turbojpeg-sys"),
            Codec::JpegLs => ("CharLS", "BSD-3-Clause", "charls-sys"),
            Codec::Jpeg2000 => ("OpenJPEG", "BSD-2-Clause", "openjpeg-sys"),
            Codec::JpegXl => ("jxl-rs", "BSD-3-Clause", "jxl"),
        }
    }
}

/// Whether the JPEG decoder has its SIMD code: without, it takes several times as long.
pub fn jpeg_has_simd() -> bool {
    env!("DICOMNODE_JPEG_SIMD") == "1"
}

impl Shape {
    /// Samples of a frame.
    fn samples_of_frame(&self) -> Result<usize> {
        let pixels = u64::from(self.rows) * u64::from(self.columns);
        pixels
            .checked_mul(u64::from(self.samples))
            .filter(|count| *count > 0 && *count < 1 << 32)
            .and_then(|count| usize::try_from(count).ok())
            .ok_or_else(|| broken("expected a frame of 1 to 2^32 samples"))
    }

    /// Bytes of one cell of uncompressed pixels.
    fn cell(&self) -> Result<usize> {
        match self.bits_allocated {
            8 | 16 | 32 => Ok(self.bits_allocated as usize / 8),
            found => Err(Error::unsupported(format!(
                "expected BitsAllocated of 8, 16 or 32, found {found}"
            ))
            .at(0x0028_0100)),
        }
    }

    /// The error where a frame cannot hold so many samples, before memory is taken for them.
    ///
    /// `ratio` is the most samples that a codec has for a byte.
    fn check_held(&self, frame: &[u8], ratio: usize) -> Result<()> {
        let (count, bytes) = (self.samples_of_frame()?, frame.len());
        if count <= bytes.saturating_mul(ratio) {
            return Ok(());
        }
        Err(broken(format!(
            "expected a frame that can hold {} x {} x {} samples (Rows, Columns, SamplesPerPixel), \
             found {bytes} bytes",
            self.rows, self.columns, self.samples
        )))
    }

    /// The same for codecs that can say of any number of samples that they are equal: only what is
    /// larger than any image is held against its bytes.
    fn check_plausible(&self, frame: &[u8]) -> Result<()> {
        if self.samples_of_frame()? <= LARGE_SAMPLES {
            return Ok(());
        }
        self.check_held(frame, LARGE_RATIO)
    }

    /// The error where a codestream has another size than its header tells.
    fn check(&self, rows: u32, columns: u32, samples: u32) -> Result<()> {
        if (rows, columns, samples) == (self.rows, self.columns, self.samples) {
            return Ok(());
        }
        Err(Error::unfit(format!(
            "expected a codestream of {} x {} x {} (Rows, Columns, SamplesPerPixel), found {rows} x \
             {columns} x {samples}",
            self.rows, self.columns, self.samples
        ))
        .at(PIXEL_DATA))
    }
}

/// Bytes that are aligned for 32 bit cells and reused from frame to frame.
#[derive(Debug, Default)]
pub struct Buffer {
    words: Vec<u32>,
    length: usize,
}

impl Buffer {
    /// Make it `count` cells of `size` bytes long; what it holds then is not defined.
    fn resize(&mut self, count: usize, size: usize) -> Result<&mut [u8]> {
        self.length = count
            .checked_mul(size)
            .ok_or_else(|| broken("expected a frame of less than 16 EiB"))?;
        let words = self.length.div_ceil(4);
        if self.words.len() < words {
            let more = words - self.words.len();
            self.words
                .try_reserve_exact(more)
                .map_err(|_| broken(format!("no memory for a frame of {} bytes", self.length)))?;
            self.words.resize(words, 0);
        }
        Ok(self.bytes_mut())
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: any bytes of a u32 are valid as u8, which has no alignment.
        let (_, bytes, _) = unsafe { self.words.align_to::<u8>() };
        bytes.get(..self.length).unwrap_or_default()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: any bytes are valid as u8 and as u32, and u8 has no alignment.
        let (_, bytes, _) = unsafe { self.words.align_to_mut::<u8>() };
        bytes.get_mut(..self.length).unwrap_or_default()
    }
}

/// One decoded frame; its buffers are reused.
#[derive(Debug, Default)]
pub struct Decoded {
    cells: Buffer,
    /// Bits of a cell: 8, 16 or 32.
    pub allocated: u32,
    /// Bits of a sample as the codestream says; None where it does not say, and the cells are what
    /// the header describes.
    pub precision: Option<u32>,
    /// Whether the codestream says that samples are signed.
    pub signed: bool,
    /// Whether the codestream tells the sign at all.
    pub knows_sign: bool,
    /// What three samples are, after decoding.
    pub space: Space,
    /// Where the codestream contradicts the header on colours.
    pub note: Option<String>,
    scratch: Buffer,
    jpeg: Option<jpeg::Decoder>,
}

impl Decoded {
    /// Samples interleaved, row by row, in little endian cells.
    pub fn bytes(&self) -> &[u8] {
        self.cells.bytes()
    }

    /// The same, to be changed in place.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.cells.bytes_mut()
    }

    /// Change how the cells lie; `job` gets the old ones, and a buffer of `count` cells of `size`
    /// bytes for the new.
    pub(crate) fn rearrange(
        &mut self,
        count: usize,
        size: usize,
        job: impl FnOnce(&[u8], &mut [u8]),
    ) -> Result<()> {
        job(self.cells.bytes(), self.scratch.resize(count, size)?);
        std::mem::swap(&mut self.cells, &mut self.scratch);
        Ok(())
    }

    /// Take uncompressed pixels as they are.
    pub(crate) fn fill(
        &mut self,
        length: usize,
        job: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.precision = None;
        job(self.cells.resize(length, 1)?)
    }

    /// Whether all cells hold values of so many bits, with the sign extended or not.
    ///
    /// Cells of 8 and 16 bits only, as JPEG and JPEG-LS have them.
    pub fn fits(&self, bits: u32, signed: bool) -> bool {
        let precision = self.precision.unwrap_or(self.allocated);
        let spread = 32 - precision;
        let fits = |cell: u32| {
            let extended = (cell << spread).cast_signed() >> spread;
            cell >> bits == 0 || (signed && (extended >> (bits - 1)) == -1)
        };
        let bytes = self.bytes();
        if self.allocated == 8 {
            bytes.iter().all(|byte| fits(u32::from(*byte)))
        } else {
            let (cells, _) = bytes.as_chunks::<2>();
            cells
                .iter()
                .all(|cell| fits(u32::from(u16::from_le_bytes(*cell))))
        }
    }

    /// A buffer of so many samples in cells for that precision.
    fn prepare(&mut self, samples: usize, precision: u32) -> Result<&mut [u8]> {
        self.precision = Some(precision);
        (self.signed, self.knows_sign) = (false, false);
        self.allocated = match precision {
            0..=8 => 8,
            9..=16 => 16,
            _ => 32,
        };
        self.cells.resize(samples, self.allocated as usize / 8)
    }

    /// A buffer of cells as the header describes them.
    fn prepare_cells(&mut self, shape: Shape) -> Result<&mut [u8]> {
        self.precision = None;
        (self.signed, self.knows_sign) = (false, false);
        self.allocated = shape.bits_allocated;
        self.cells.resize(shape.samples_of_frame()?, shape.cell()?)
    }
}

/// Decode one frame.
///
/// Errors: [`Error::InvalidDicom`] for a codestream that is damaged or of another kind,
/// [`Error::InvalidDataset`] where its size is not that of the header.
pub fn decode(
    codec: Codec,
    frame: &[u8],
    shape: Shape,
    wish: Wish,
    into: &mut Decoded,
) -> Result<()> {
    (into.space, into.note) = (wish.space, None);
    match codec {
        Codec::Plain => {
            shape.check_held(frame, 1)?;
            let cells = into.prepare_cells(shape)?;
            let frame = frame.get(..cells.len()).ok_or_else(|| {
                broken(format!(
                    "expected a frame of {} bytes, found {}",
                    cells.len(),
                    frame.len()
                ))
            })?;
            cells.copy_from_slice(frame);
            Ok(())
        }
        Codec::Deflated => deflated::decode(frame, shape, into),
        Codec::Rle => rle::decode(frame, shape, into),
        Codec::Jpeg | Codec::JpegLs | Codec::Jpeg2000 | Codec::JpegXl => match found(frame) {
            Some(Codec::Jpeg) => jpeg::decode(frame, shape, wish, into),
            Some(Codec::JpegLs) => jpeg_ls::decode(frame, shape, into),
            Some(Codec::Jpeg2000) => jpeg2000::decode(frame, shape, wish, into),
            Some(Codec::JpegXl) => jpeg_xl::decode(frame, shape, into),
            _ => Err(broken(
                "expected a codestream of the JPEG family, found none",
            )),
        },
    }
}

/// Whether bytes start like a codestream of the JPEG family.
pub(crate) fn starts_codestream(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\xFF\xD8\xFF") || is_jpeg2000(bytes) || is_jpeg_xl(bytes)
}

fn is_jpeg2000(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\xFF\x4F\xFF\x51") || bytes.starts_with(b"\0\0\0\x0CjP  \r\n\x87\n")
}

fn is_jpeg_xl(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\xFF\x0A") || bytes.starts_with(b"\0\0\0\x0CJXL \r\n\x87\n")
}

fn found(frame: &[u8]) -> Option<Codec> {
    if is_jpeg2000(frame) {
        Some(Codec::Jpeg2000)
    } else if is_jpeg_xl(frame) {
        Some(Codec::JpegXl)
    } else if frame.starts_with(b"\xFF\xD8") {
        let is_ls = jpeg::start_of_frame(frame).is_ok_and(|start| start.marker == 0xF7);
        Some(if is_ls { Codec::JpegLs } else { Codec::Jpeg })
    } else {
        None
    }
}

/// What a note says where header and codestream differ on colours; the codestream counts.
fn other_colors(said: Space) -> String {
    let (header, codestream) = match said {
        Space::Rgb => ("YBR", "RGB"),
        Space::Ybr => ("RGB", "YBR"),
    };
    format!(
        "PhotometricInterpretation says {header}, the codestream {codestream}; the codestream counts"
    )
}

fn broken(message: impl Into<String>) -> Error {
    Error::invalid_at(PIXEL_DATA, message)
}
