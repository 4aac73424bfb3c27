//! Many images into one array, in parallel.
//!
//! The problem: a volume is hundreds of files of half a megabyte. Reading each whole, converting it
//! and copying it into place moves every voxel several times. Here each image is read in parts that
//! stay in the cache and converted straight into its own slice of the array that the caller gave.
//!
//! Threads live for one call only: there is no pool that a fork could break.

use std::num::NonZero;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use crate::codec::{self, Codec, Decoded, Shape};
use crate::encapsulated::Frames;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::pixels::{Conversion, Format, Value};
use crate::scan::{PIXEL_DATA, UNDEFINED};
use crate::source::{self, Source};

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

/// Write slice `k` to the `k`-th `rows * columns` values of `out`; a note for each slice whose
/// codestream contradicts its header.
///
/// With `rescale` a value is `stored * slope + intercept`, else it is the stored one.
///
/// Errors: [`Error::UnsupportedImage`] for pixels that are not decoded, or have several samples;
/// [`Error::InvalidDicom`] for pixel data that is damaged, too short or of another size,
/// contradictory bits or a slope of zero; [`Error::InvalidDataset`] for values that `T` cannot hold,
/// and a codestream of another size; [`Error::Io`]. What `out` holds after an error is not defined.
pub fn stack<T: Value>(
    slices: &[Slice<'_>],
    rows: usize,
    columns: usize,
    out: &mut [T],
    rescale: bool,
) -> Result<Vec<String>> {
    let size = rows.checked_mul(columns);
    let Some(size) = size.filter(|size| size.checked_mul(slices.len()) == Some(out.len())) else {
        return Err(Error::invalid(format!(
            "expected an array of {} x {rows} x {columns} values, found {}",
            slices.len(),
            out.len()
        )));
    };
    let uid = |slice: &Slice<'_>| slice.image.sop_instance_uid.clone();
    let mut plans = Vec::with_capacity(slices.len());
    for (place, slice) in slices.iter().enumerate() {
        let plan = Plan::new(slice, rows, columns, rescale);
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
            plan.fill(slice, out, scratch)
                .map(|note| note.map(|note| format!("{}: {note}", uid(slice))))
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
    slope: f64,
    intercept: f64,
    pixels: Pixels,
}

enum Pixels {
    /// Uncompressed, in one piece.
    Native {
        format: Format,
        offset: u64,
        bytes: u64,
    },
    /// In fragments.
    Encapsulated(Codec),
}

impl Plan {
    fn new(slice: &Slice<'_>, rows: usize, columns: usize, rescale: bool) -> Result<Self> {
        let image = slice.image;
        if image.pixel_tag == 0 {
            return Err(Error::unsupported("expected pixel data, found none"));
        }
        if image.pixel_tag != PIXEL_DATA {
            let message = "expected Pixel Data of integers, found floats";
            return Err(Error::unsupported(message).at(image.pixel_tag));
        }
        if image.samples_per_pixel != 1 {
            let message = format!(
                "expected 1 sample per pixel, found {}",
                image.samples_per_pixel
            );
            return Err(Error::unsupported(message).at(0x0028_0002));
        }
        if slice.image.frame >= image.number_of_frames {
            let (frame, frames) = (slice.image.frame, image.number_of_frames);
            let message = format!("expected more than {frame} frames, found {frames}");
            return Err(Error::invalid_at(0x0028_0008, message));
        }
        for (tag, expected, found) in [
            (0x0028_0010, rows, image.rows),
            (0x0028_0011, columns, image.columns),
        ] {
            if u32::try_from(expected) != Ok(found) {
                return Err(Error::invalid_at(
                    tag,
                    format!("expected {expected}, found {found}"),
                ));
            }
        }
        let (slope, intercept) = if rescale {
            (image.slope, image.intercept)
        } else {
            (1.0, 0.0)
        };
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
        Ok(Plan {
            slope,
            intercept,
            pixels: Pixels::new(slice)?,
        })
    }

    /// Fill one slice; a note where its codestream contradicts its header.
    fn fill<T: Value>(
        self,
        slice: &Slice<'_>,
        out: &mut [T],
        scratch: &mut Scratch,
    ) -> Result<Option<String>> {
        let Plan {
            slope,
            intercept,
            pixels,
        } = self;
        match pixels {
            Pixels::Native {
                format,
                offset,
                bytes,
            } => {
                let mut conversion = Conversion::new::<T>(format, slope, intercept);
                let place = (offset, bytes);
                match (&slice.image.inflated, slice.source) {
                    (Some(bytes), _) => fill_from_bytes(&mut conversion, bytes, place, out)?,
                    (None, Source::Bytes(bytes)) => {
                        fill_from_bytes(&mut conversion, bytes, place, out)?;
                    }
                    (None, Source::File(path)) => {
                        let step = PART / format.cell();
                        let buffer = &mut scratch.buffer;
                        fill_from_file(&mut conversion, path, place, out, step, buffer)?;
                    }
                }
                conversion.finish::<T>()?;
                Ok(None)
            }
            Pixels::Encapsulated(codec) => {
                let decoded = &mut scratch.decoded;
                decode_frame(slice, codec, &mut scratch.buffer, decoded)?;
                let (format, note) = format_of(slice.image, decoded)?;
                let mut conversion = Conversion::new::<T>(format, slope, intercept);
                conversion.run(decoded.bytes(), out);
                conversion.finish::<T>()?;
                Ok(note)
            }
        }
    }
}

impl Pixels {
    fn new(slice: &Slice<'_>) -> Result<Self> {
        let image = slice.image;
        let syntax = &image.transfer_syntax;
        if !image.is_native {
            let codec = codec::codec_of(syntax)?;
            if !image.is_encapsulated {
                return Err(Error::invalid_at(
                    PIXEL_DATA,
                    format!("expected fragments (transfer syntax {syntax}), found none"),
                ));
            }
            return Ok(Pixels::Encapsulated(codec));
        }
        let format = header_format(image)?;
        let pixels = u64::from(image.rows).checked_mul(u64::from(image.columns));
        let bytes = pixels.and_then(|pixels| format.bytes(pixels));
        let bytes = bytes
            .filter(|bytes| *bytes < u64::from(UNDEFINED))
            .ok_or_else(|| {
                Error::invalid("expected an image of less than 4 GiB, found a larger one")
            })?;
        if slice.image.frame > 0
            && image.swapped_pairs
            && pixels.is_some_and(|pixels| pixels % 2 == 1)
        {
            return Err(Error::unsupported(
                "expected frames of an even size, found 8 bit cells of 16 bit words that two frames \
                 share",
            ));
        }
        // All factors are below 2^32.
        let all = bytes * u64::from(image.number_of_frames);
        if image.pixel_length < all {
            return Err(short(all, image.pixel_length));
        }
        Ok(Pixels::Native {
            format,
            offset: image
                .pixel_offset
                .saturating_add(bytes * u64::from(slice.image.frame)),
            bytes,
        })
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
    buffer: &mut Vec<u8>,
    into: &mut Decoded,
) -> Result<()> {
    let image = slice.image;
    let source = slice.source.open()?;
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
    let shape = Shape {
        rows: image.rows,
        columns: image.columns,
        samples: image.samples_per_pixel,
        bits_allocated: image.bits_allocated,
    };
    codec::decode(codec, frame, shape, into)
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

fn fill_from_bytes<T: Value>(
    conversion: &mut Conversion,
    bytes: &[u8],
    (offset, length): (u64, u64),
    out: &mut [T],
) -> Result<()> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = bytes.get(start..).unwrap_or_default();
    let size = usize::try_from(length).unwrap_or(usize::MAX);
    let Some(pixels) = rest.get(..size) else {
        return Err(short(length, rest.len() as u64));
    };
    conversion.run(pixels, out);
    Ok(())
}

/// `step` values are read and converted at a time.
fn fill_from_file<T: Value>(
    conversion: &mut Conversion,
    path: &Path,
    (offset, length): (u64, u64),
    out: &mut [T],
    step: usize,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    let (file, _) = source::open(path)?;
    buffer.resize(PART, 0);
    let mut done = 0_u64;
    for out in out.chunks_mut(step) {
        let part = (length - done).min(PART as u64) as usize;
        let part = buffer.get_mut(..part).unwrap_or_default();
        let found = source::read_at(&file, path, offset + done, part)?;
        if found < part.len() {
            return Err(short(length, done + found as u64));
        }
        conversion.run(part, out);
        done += found as u64;
    }
    Ok(())
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
