//! Many images into one array, in parallel.
//!
//! The problem: a volume is hundreds of files of half a megabyte. Reading each whole, converting it
//! and copying it into place moves every voxel several times. Here each image is read in parts that
//! stay in the cache and converted straight into its own slice of the array that the caller gave.
//!
//! Threads live for one call only: there is no pool that a fork could break.

use std::num::NonZero;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use crate::codec::{self, Codec, Decoded, Shape, Wish};
use crate::color::{self, Colors, Layout, Space};
use crate::encapsulated::Frames;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::pixels::{Conversion, Format, Lut, Value};
use crate::scan::{DOUBLE_FLOAT_PIXEL_DATA, FLOAT_PIXEL_DATA, PIXEL_DATA, UNDEFINED};
use crate::source::{self, Opened, Source};

/// Bytes of a file that are read and converted at a time.
const PART: usize = 256 << 10;
/// Values below which a second thread costs more than it brings.
const FEW: usize = 1 << 16;

/// An image, which is one frame, and where its bytes are.
#[derive(Debug, Clone, Copy)]
pub struct Slice<'a> {
    pub image: &'a Image,
    /// The source that `image` was scanned from.
    pub source: Source<'a>,
}

/// The size of each image of an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub samples: usize,
}

/// What the values of an array are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// What stored values mean, by slope and intercept or by a table; else the stored ones.
    pub rescale: bool,
    /// Red, green and blue where an image has luminance and chrominance; else what is stored.
    pub rgb: bool,
}

/// Write slice `k` to the `k`-th part of `out`, one sample after the other, row by row; notes for
/// the slices whose codestream contradicts their header, or whose pixel data goes on.
///
/// Errors: [`Error::UnsupportedImage`] for pixels that are not decoded; [`Error::InvalidDicom`] for
/// pixel data that is damaged, too short or of another size, contradictory bits or a slope of zero;
/// [`Error::InvalidDataset`] for values that `T` cannot hold, and a codestream of another size;
/// [`Error::Io`]. What `out` holds after an error is not defined.
pub fn stack<T: Value>(
    slices: &[Slice<'_>],
    matrix: Matrix,
    out: &mut [T],
    reading: Reading,
) -> Result<Vec<String>> {
    let Matrix {
        rows,
        columns,
        samples,
    } = matrix;
    let size = rows
        .checked_mul(columns)
        .and_then(|size| size.checked_mul(samples));
    let Some(size) = size.filter(|size| size.checked_mul(slices.len()) == Some(out.len())) else {
        return Err(Error::invalid(format!(
            "expected an array of {} x {rows} x {columns} x {samples} values, found {}",
            slices.len(),
            out.len()
        )));
    };
    let uid = |slice: &Slice<'_>| slice.image.sop_instance_uid.clone();
    let mut plans = Vec::with_capacity(slices.len());
    for (place, slice) in slices.iter().enumerate() {
        let plan = Plan::new(slice, matrix, reading);
        plans.push(plan.map_err(|error| error.of(&uid(slice)).in_place(place))?);
    }
    if size == 0 {
        return Ok(Vec::new());
    }
    // Decoding a frame takes much longer than starting a thread.
    let is_compressed = slices.iter().any(|slice| !slice.image.is_native);
    let threads = if out.len() < FEW && !is_compressed {
        1
    } else {
        slices.len()
    };
    let work = slices
        .iter()
        .zip(plans)
        .zip(out.chunks_exact_mut(size))
        .enumerate();
    let notes = parallel(
        work,
        threads,
        Scratch::default,
        |scratch, (place, ((slice, plan), out))| {
            let mut notes = Vec::new();
            plan.fill(slice, out, scratch, &mut |note| {
                notes.push(format!("{}: {note}", uid(slice)));
            })
            .map(|()| notes)
            .map_err(|error| error.of(&uid(slice)).in_place(place))
        },
    )?;
    Ok(notes.into_iter().flatten().collect())
}

/// What a thread reuses from slice to slice.
#[derive(Default)]
struct Scratch {
    buffer: Vec<u8>,
    decoded: Decoded,
}

/// What is to be done for one slice, checked.
struct Plan {
    meaning: Meaning,
    colors: Colors,
    rgb: bool,
    pixels: Pixels,
}

/// What stored values mean.
enum Meaning {
    Line { slope: f64, intercept: f64 },
    Table(Arc<Lut>),
}

enum Pixels {
    /// Uncompressed, in one piece.
    Native { format: Format, place: Place },
    /// Uncompressed, and samples have to be put in order first.
    Unordered { format: Format, place: Place },
    /// Uncompressed, eight to a byte; the first is that bit of the place.
    Bits { first: u32, place: Place },
    /// Uncompressed floats, of 32 or 64 bits.
    Floats { double: bool, place: Place },
    /// In fragments.
    Encapsulated(Codec),
}

/// A frame in its source.
#[derive(Clone, Copy)]
struct Place {
    offset: u64,
    bytes: u64,
    /// Bytes of the pixel data after the last frame.
    surplus: u64,
}

impl Plan {
    fn new(slice: &Slice<'_>, matrix: Matrix, reading: Reading) -> Result<Self> {
        let image = slice.image;
        if image.pixel_tag == 0 {
            return Err(Error::unsupported("expected pixel data, found none"));
        }
        if slice.image.frame >= image.number_of_frames {
            let (frame, frames) = (slice.image.frame, image.number_of_frames);
            let message = format!("expected more than {frame} frames, found {frames}");
            return Err(Error::invalid_at(0x0028_0008, message));
        }
        for (tag, expected, found) in [
            (0x0028_0010, matrix.rows, image.rows),
            (0x0028_0011, matrix.columns, image.columns),
            (0x0028_0002, matrix.samples, image.samples_per_pixel),
        ] {
            if u32::try_from(expected) != Ok(found) {
                return Err(Error::invalid_at(
                    tag,
                    format!("expected {expected}, found {found}"),
                ));
            }
        }
        let colors = Colors::new(
            &image.photometric_interpretation,
            image.samples_per_pixel,
            image.planar_configuration,
            image.is_native,
        )?;
        if colors.layout == Layout::Shared && !image.columns.is_multiple_of(2) {
            let message = format!(
                "expected an even number for YBR_FULL_422, found {}",
                image.columns
            );
            return Err(Error::invalid_at(0x0028_0011, message));
        }
        Ok(Plan {
            meaning: Meaning::new(slice, reading.rescale)?,
            pixels: Pixels::new(slice, colors)?,
            colors,
            rgb: reading.rgb,
        })
    }

    /// Fill one slice; `note` is told where its codestream contradicts its header.
    fn fill<T: Value>(
        self,
        slice: &Slice<'_>,
        out: &mut [T],
        scratch: &mut Scratch,
        note: &mut dyn FnMut(String),
    ) -> Result<()> {
        let Scratch { buffer, decoded } = scratch;
        match self.pixels {
            Pixels::Native { format, place } => {
                let mut conversion = self.meaning.conversion::<T>(format);
                let step = PART / format.cell();
                place.read(slice, buffer, PART, &mut |done, part| {
                    let start = done / PART * step;
                    let out = out.get_mut(start..).unwrap_or_default();
                    let end = out.len().min(step.max(part.len() / format.cell()));
                    conversion.run(part, out.get_mut(..end).unwrap_or_default());
                })?;
                conversion.finish::<T>()?;
                place.tell_surplus(note);
            }
            Pixels::Unordered { format, place } => {
                decoded.fill(place.bytes as usize, |cells| place.fill(slice, cells))?;
                decoded.space = self.colors.space;
                let format = self.order(slice, format, decoded)?;
                let mut conversion = self.meaning.conversion::<T>(format);
                conversion.run(decoded.bytes(), out);
                conversion.finish::<T>()?;
                place.tell_surplus(note);
            }
            Pixels::Bits { first, place } => {
                decoded.fill(place.bytes as usize, |cells| place.fill(slice, cells))?;
                let mut conversion = self.meaning.conversion::<T>(Format::BITS);
                decoded.rearrange(out.len(), 1, |bytes, cells| unpack(bytes, first, cells))?;
                conversion.run(decoded.bytes(), out);
                conversion.finish::<T>()?;
                place.tell_surplus(note);
            }
            Pixels::Floats { double, place } => {
                let mut conversion = self.meaning.conversion::<T>(Format::BITS);
                let big = slice.image.big_endian_pixels;
                let size = if double { 8 } else { 4 };
                place.read(slice, buffer, PART, &mut |done, part| {
                    let out = out.get_mut(done / size..).unwrap_or_default();
                    match (double, big) {
                        (false, false) => {
                            conversion.run_floats(part, out, |b| f32::from_le_bytes(b).into());
                        }
                        (false, true) => {
                            conversion.run_floats(part, out, |b| f32::from_be_bytes(b).into());
                        }
                        (true, false) => conversion.run_floats(part, out, f64::from_le_bytes),
                        (true, true) => conversion.run_floats(part, out, f64::from_be_bytes),
                    }
                })?;
                conversion.finish::<T>()?;
                place.tell_surplus(note);
            }
            Pixels::Encapsulated(codec) => {
                let wish = Wish {
                    space: self.colors.space,
                    rgb: self.rgb,
                };
                decode_frame(slice, codec, wish, buffer, decoded)?;
                let format = if decoded.precision.is_none() && slice.image.bits_allocated == 1 {
                    decoded.rearrange(out.len(), 1, |bytes, cells| unpack(bytes, 0, cells))?;
                    Format::BITS
                } else {
                    let (format, said) = format_of(slice.image, decoded)?;
                    said.into_iter()
                        .chain(decoded.note.take())
                        .for_each(&mut *note);
                    self.order(slice, format, decoded)?
                };
                let mut conversion = self.meaning.conversion::<T>(format);
                conversion.run(decoded.bytes(), out);
                conversion.finish::<T>()?;
            }
        }
        Ok(())
    }

    /// Samples one pixel after the other, in RGB where that is wanted; how they then lie.
    fn order(&self, slice: &Slice<'_>, format: Format, decoded: &mut Decoded) -> Result<Format> {
        let image = slice.image;
        let cell = format.cell();
        let samples = image.samples_per_pixel as usize;
        // RLE and the JPEG family have an order of their own.
        let is_as_told =
            decoded.precision.is_none() && !matches!(self.pixels, Pixels::Encapsulated(Codec::Rle));
        let mut format = format;
        if is_as_told && self.colors.layout != Layout::Pixels {
            let count = image.rows as usize * image.columns as usize * samples;
            let layout = self.colors.layout;
            format.unswap(decoded.bytes_mut());
            decoded.rearrange(count, cell, |frame, into| {
                color::arrange(layout, frame, cell, samples, into);
            })?;
        }
        if self.rgb && decoded.space == Space::Ybr {
            format.unswap(decoded.bytes_mut());
            let Some(bits) = format.of_samples() else {
                let message = "expected unsigned samples of at most 16 bits in little endian cells \
                               for YBR";
                return Err(Error::unsupported(message).at(0x0028_0004));
            };
            color::to_rgb(decoded.bytes_mut(), cell, bits);
        }
        Ok(format)
    }
}

impl Meaning {
    fn new(slice: &Slice<'_>, rescale: bool) -> Result<Self> {
        let image = slice.image;
        if !rescale {
            let (slope, intercept) = (1.0, 0.0);
            return Ok(Meaning::Line { slope, intercept });
        }
        if let Some(table) = image.table(slice.source)? {
            if image.pixel_tag != PIXEL_DATA {
                let message = "expected Pixel Data of integers for a table, found floats";
                return Err(Error::unsupported(message).at(image.pixel_tag));
            }
            return Ok(Meaning::Table(table));
        }
        let (slope, intercept) = (image.slope, image.intercept);
        for (tag, value) in [(0x0028_1053, slope), (0x0028_1052, intercept)] {
            if !value.is_finite() {
                return Err(Error::invalid_at(
                    tag,
                    format!("expected a number, found {value}"),
                ));
            }
        }
        if slope == 0.0 {
            return Err(Error::invalid_at(
                0x0028_1053,
                "expected a slope other than 0, found 0",
            ));
        }
        Ok(Meaning::Line { slope, intercept })
    }

    fn conversion<T: Value>(&self, format: Format) -> Conversion {
        match self {
            Meaning::Line { slope, intercept } => Conversion::new::<T>(format, *slope, *intercept),
            Meaning::Table(table) => Conversion::by_table::<T>(format, Arc::clone(table)),
        }
    }
}

impl Pixels {
    fn new(slice: &Slice<'_>, colors: Colors) -> Result<Self> {
        let image = slice.image;
        let syntax = &image.transfer_syntax;
        if image.bits_allocated == 1 && image.samples_per_pixel != 1 {
            let message = format!(
                "expected 1 for single bits, found {}",
                image.samples_per_pixel
            );
            return Err(Error::unsupported(message).at(0x0028_0002));
        }
        if !image.is_native {
            let codec = codec::codec_of(syntax)?;
            if !image.is_encapsulated || image.pixel_tag != PIXEL_DATA {
                return Err(Error::invalid_at(
                    PIXEL_DATA,
                    format!("expected fragments (transfer syntax {syntax}), found none"),
                ));
            }
            let is_plain = matches!(codec, Codec::Plain | Codec::Deflated);
            if is_plain && image.photometric_interpretation == "YBR_FULL_422" {
                let message = "expected whole samples in fragments that are not compressed, found \
                               YBR_FULL_422";
                return Err(Error::unsupported(message).at(0x0028_0004));
            }
            return Ok(Pixels::Encapsulated(codec));
        }
        let double = image.pixel_tag == DOUBLE_FLOAT_PIXEL_DATA;
        let is_float = double || image.pixel_tag == FLOAT_PIXEL_DATA;
        // All factors are below 2^32.
        let samples = u128::from(image.rows)
            * u128::from(image.columns)
            * u128::from(image.samples_per_pixel);
        let bits = match image.bits_allocated {
            _ if double => 64,
            _ if is_float => 32,
            bits => u128::from(bits),
        };
        let frame = samples.checked_mul(bits);
        let frame = frame.and_then(|bits| u64::try_from(bits).ok());
        let frame = frame
            .filter(|bits| bits / 8 < u64::from(UNDEFINED))
            .ok_or_else(|| {
                Error::invalid("expected an image of less than 4 GiB, found a larger one")
            })?;
        if image.bits_allocated == 1 && !is_float {
            // Frames follow each other bit by bit (PS3.5 section 8.1.1).
            let start = frame * u64::from(slice.image.frame);
            let all = (frame * u64::from(image.number_of_frames)).div_ceil(8);
            let end = (start + frame).div_ceil(8);
            let place = Place::new(image, start / 8, end - start / 8, all)?;
            let first = (start % 8) as u32;
            return Ok(Pixels::Bits { first, place });
        }
        if is_float {
            let bytes = frame / 8;
            let start = bytes * u64::from(slice.image.frame);
            let all = bytes * u64::from(image.number_of_frames);
            let place = Place::new(image, start, bytes, all)?;
            return Ok(Pixels::Floats { double, place });
        }
        let format = header_format(image)?;
        let bytes = colors.bytes(frame / 8);
        let odd = image.swapped_pairs && bytes % 2 == 1;
        if slice.image.frame > 0 && odd {
            return Err(Error::unsupported(
                "expected frames of an even size, found 8 bit cells of 16 bit words that two frames \
                 share",
            ));
        }
        let bytes = bytes + u64::from(odd);
        let start = bytes * u64::from(slice.image.frame);
        let all = bytes * u64::from(image.number_of_frames);
        let place = Place::new(image, start, bytes, all)?;
        if colors
            == (Colors {
                space: Space::Rgb,
                layout: Layout::Pixels,
            })
        {
            Ok(Pixels::Native { format, place })
        } else {
            Ok(Pixels::Unordered { format, place })
        }
    }
}

impl Place {
    /// `bytes` from `start` of the pixel data, which has to hold `all`.
    fn new(image: &Image, start: u64, bytes: u64, all: u64) -> Result<Self> {
        if image.pixel_length < all {
            return Err(short(all, image.pixel_length));
        }
        Ok(Place {
            offset: image.pixel_offset.saturating_add(start),
            bytes,
            // A value has an even length.
            surplus: image.pixel_length - all.next_multiple_of(2).min(image.pixel_length),
        })
    }

    fn tell_surplus(&self, note: &mut dyn FnMut(String)) {
        if self.surplus > 0 {
            let surplus = self.surplus;
            note(format!("{surplus} bytes after the last pixel are ignored"));
        }
    }

    /// Read the frame in parts of at most `size` bytes; each is told with where it starts.
    fn read(
        &self,
        slice: &Slice<'_>,
        buffer: &mut Vec<u8>,
        size: usize,
        each: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<()> {
        let bytes = match slice.image.open(slice.source)? {
            Opened::Bytes(bytes) => bytes,
            file @ Opened::File { .. } => {
                let left = file.size().saturating_sub(self.offset);
                if left < self.bytes {
                    return Err(short(self.bytes, left));
                }
                buffer.resize(size, 0);
                let mut done = 0;
                while done < self.bytes {
                    let part = (self.bytes - done).min(size as u64) as usize;
                    let part = buffer.get_mut(..part).unwrap_or_default();
                    file.read(self.offset + done, part)?;
                    each(done as usize, part);
                    done += part.len() as u64;
                }
                return Ok(());
            }
        };
        let start = usize::try_from(self.offset).unwrap_or(usize::MAX);
        let rest = bytes.get(start..).unwrap_or_default();
        let length = usize::try_from(self.bytes).unwrap_or(usize::MAX);
        let Some(pixels) = rest.get(..length) else {
            return Err(short(self.bytes, rest.len() as u64));
        };
        each(0, pixels);
        Ok(())
    }

    /// Read the whole frame.
    fn fill(&self, slice: &Slice<'_>, into: &mut [u8]) -> Result<()> {
        slice.image.open(slice.source)?.read(self.offset, into)
    }
}

/// Single bits, the lowest of a byte first, as cells of 8 bits.
fn unpack(bytes: &[u8], first: u32, cells: &mut [u8]) {
    let first = first as usize;
    for (k, cell) in cells.iter_mut().enumerate() {
        let at = first + k;
        *cell = bytes.get(at / 8).map_or(0, |byte| byte >> (at % 8) & 1);
    }
}

/// How stored values lie in uncompressed pixels.
fn header_format(image: &Image) -> Result<Format> {
    Format::new(
        image.bits_allocated,
        image.bits_stored,
        image.high_bit,
        image.pixel_representation,
        image.big_endian_pixels,
        image.swapped_pairs,
    )
}

/// Find one frame in the fragments of an image, and decode it.
fn decode_frame(
    slice: &Slice<'_>,
    codec: Codec,
    wish: Wish,
    buffer: &mut Vec<u8>,
    into: &mut Decoded,
) -> Result<()> {
    let image = slice.image;
    let source = image.open(slice.source)?;
    let found;
    let frames = match image.frames.get() {
        Some(frames) => frames,
        None => {
            let mut offsets = Vec::new();
            if let Some(table) = image.extended_offsets
                && u64::from(table.length) == 8 * u64::from(image.number_of_frames)
            {
                if u64::from(table.length) > source.size() {
                    return Err(source::ended(table.offset));
                }
                offsets.resize(table.length as usize, 0);
                source.read(table.offset, &mut offsets)?;
            }
            let count = image.number_of_frames;
            found = Frames::find(&source, image.pixel_offset, count, &offsets)?;
            // Where another thread was faster, both found the same.
            image.frames.get_or_init(|| found)
        }
    };
    let fragments = frames.frame(slice.image.frame as usize);
    let borrowed = match fragments {
        [one] => source.borrow(one.offset, one.length as usize),
        _ => None,
    };
    let frame = match borrowed {
        Some(frame) => frame,
        None => {
            buffer.clear();
            for fragment in fragments {
                let start = buffer.len();
                // Fragments do not overlap, so all of them are not longer than the source.
                buffer.resize(start + fragment.length as usize, 0);
                let into = buffer.get_mut(start..).unwrap_or_default();
                source.read(fragment.offset, into)?;
            }
            buffer.as_slice()
        }
    };
    let mut shape = Shape {
        rows: image.rows,
        columns: image.columns,
        samples: image.samples_per_pixel,
        bits_allocated: image.bits_allocated,
    };
    if image.bits_allocated == 1 && matches!(codec, Codec::Plain | Codec::Deflated | Codec::Rle) {
        // Eight to a byte.
        let pixels = u64::from(image.rows) * u64::from(image.columns);
        shape = Shape {
            rows: 1,
            columns: u32::try_from(pixels.div_ceil(8)).unwrap_or(u32::MAX),
            samples: 1,
            bits_allocated: 8,
        };
    }
    codec::decode(codec, frame, shape, wish, into)
}

/// How the samples of a decoded frame are to be read, and a note where header and codestream differ.
///
/// A codestream counts more than the header: its bits, and its sign where it has one. Of JPEG and
/// JPEG-LS only the header knows whether samples are signed; their cells are often coded whole, so
/// the sign is at BitsStored as long as all cells agree with that.
fn format_of(image: &Image, decoded: &Decoded) -> Result<(Format, Option<String>)> {
    let Some(precision) = decoded.precision else {
        return Ok((header_format(image)?, None));
    };
    let stored = image.bits_stored;
    let is_signed = image.pixel_representation == 1;
    let mut note = None;
    let mut bits = precision;
    if decoded.signed != is_signed && decoded.knows_sign {
        let name = |signed| if signed { "signed" } else { "unsigned" };
        note = Some(format!(
            "PixelRepresentation says {}, the codestream {}; values are taken as signed",
            name(is_signed),
            name(decoded.signed)
        ));
    } else if !decoded.knows_sign && (1..precision).contains(&stored) {
        if decoded.fits(stored, is_signed) {
            bits = stored;
        } else {
            note = Some(format!(
                "BitsStored is {stored}, the codestream has {precision} bits and uses them; the \
                 codestream counts"
            ));
        }
    }
    let representation = u32::from(is_signed || decoded.signed);
    let format = Format::new(
        decoded.allocated,
        bits,
        bits - 1,
        representation,
        false,
        false,
    )?;
    Ok((format, note))
}

fn short(expected: u64, found: u64) -> Error {
    Error::invalid_at(
        PIXEL_DATA,
        format!("expected at least {expected} bytes, found {found}"),
    )
}

/// Do `job` for every item of `work` on up to `threads` threads; the results in order.
///
/// The first error in the order of `work` ends it. Each thread has its own `state`.
pub(crate) fn parallel<W, S, R>(
    work: W,
    threads: usize,
    state: impl Fn() -> S + Sync,
    job: impl Fn(&mut S, W::Item) -> Result<R> + Sync,
) -> Result<Vec<R>>
where
    W: Iterator + Send,
    R: Send,
{
    let threads = threads.clamp(1, processors());
    if threads == 1 {
        let mut state = state();
        return work.map(|item| job(&mut state, item)).collect();
    }
    let queue = Mutex::new(work.enumerate());
    let stop = AtomicBool::new(false);
    let worker = || {
        let mut state = state();
        let mut done = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            // Items are handed out in order, so every item before a failed one was begun.
            let item = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((place, item)) = item else { break };
            match job(&mut state, item) {
                Ok(result) => done.push((place, result)),
                Err(error) => {
                    stop.store(true, Ordering::Relaxed);
                    return (done, Some((place, error)));
                }
            }
        }
        (done, None)
    };
    let mut outcomes = thread::scope(|scope| {
        // Where the system has no more threads, fewer do the same work.
        let others: Vec<_> = (1..threads)
            .map_while(|_| thread::Builder::new().spawn_scoped(scope, worker).ok())
            .collect();
        let mut outcomes = vec![worker()];
        for other in others {
            outcomes.push(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        outcomes
    });
    let failed = outcomes.iter_mut().filter_map(|(_, error)| error.take());
    if let Some((_, error)) = failed.min_by_key(|(place, _)| *place) {
        return Err(error);
    }
    let mut results: Vec<(usize, R)> = outcomes.into_iter().flat_map(|(done, _)| done).collect();
    results.sort_unstable_by_key(|(place, _)| *place);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

/// How many threads can run at once; asked once, because the answer is read from files.
fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get))
}

#[cfg(test)]
mod tests;
