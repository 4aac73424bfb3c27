//! `Receiver` and `Received`: what arrives over an association, read without the interpreter.

use std::ffi::c_int;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use dicomnode_core::bytes::Bytes;
use dicomnode_core::digest::Kind;
use dicomnode_core::hashing::{self, Coming};
use dicomnode_core::incoming::{self, Flush, Growing, Incoming};
use dicomnode_core::meta::prefix;
use dicomnode_core::names::{self, Ordinary, is_uid};
use dicomnode_core::receive as core;
use dicomnode_core::source::Source;
use dicomnode_core::{Error, Result, extent, scan};
use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_tcp_quickack;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::digest::kind_of;
use crate::errors::{attached, detached};
use crate::header::Header;
use crate::memory::Owner;

/// Parses one association's bytes into C-STORE requests (PS3.7 section 9.1.1).
///
/// `contexts` are the accepted presentation contexts: ID and transfer syntax. `socket` is read by `receive` until `wake` can
/// be read; both are duplicated, so that the caller may close them at any time. Of a dataset at most `memory` bytes are held.
/// `digest_size` tells the kind of the digests, as in `digest`. With `folder` each image is written to a Part 10
/// file there while it arrives, unless less than `least_free` bytes are free; `title` is the AE title of its sender.
/// `identifier_tag` is the attribute that tells who an image belongs to.
///
/// Raises OSError where they cannot be duplicated.
#[pyclass(frozen, module = "dicomnode._core")]
pub struct Receiver(Arc<Connection>);

/// What a `Receiver` and the images that it gives have together.
struct Connection {
    state: Mutex<State>,
    answers: Mutex<Answers>,
    kind: Kind,
    contexts: Vec<(u8, String)>,
    /// The attribute that tells who an image belongs to.
    tag: u32,
    arriving: AtomicUsize,
    is_arriving: AtomicBool,
    is_large: AtomicBool,
    total: AtomicU64,
}

struct State {
    parser: core::Receiver,
    /// None where images are kept in memory.
    incoming: Option<Incoming>,
    kept: Kept,
    /// What was read before it was asked for.
    ahead: Option<Result<Outcome>>,
}

/// How images are answered.
struct Answers {
    socket: Option<Arc<OwnedFd>>,
    /// Can be read where the caller is to look up.
    wake: Option<Arc<OwnedFd>>,
    /// Of the last answers.
    unsent: Vec<u8>,
    /// Whether there was one since the last time that something was read.
    is_new: bool,
}

impl Answers {
    /// Send an answer, as much as the socket takes at once, behind what is left of those before it.
    fn give(&mut self, response: &[u8]) {
        self.is_new = true;
        match &self.socket {
            Some(socket) if self.unsent.is_empty() => {
                self.unsent = rest_of(socket.as_fd(), response);
            }
            _ => self.unsent.extend_from_slice(response),
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What of the dataset that is arriving is in a file.
#[derive(Default)]
struct Kept {
    /// None also where nothing can be kept.
    file: Option<Growing>,
    is_begun: bool,
    /// Of the bytes in memory so many are written, too.
    written: usize,
    /// Whether the dataset is too large for memory.
    is_large: bool,
    errno: Option<i32>,
}

impl Kept {
    /// Write what has come and is not written yet, whole parts of it where it is not the last; after a
    /// failure nothing is kept. Whether anything was to be written.
    fn write(
        &mut self,
        incoming: Option<&mut Incoming>,
        store: &core::Store,
        is_last: bool,
    ) -> bool {
        let Some(incoming) = incoming else {
            return false;
        };
        if !self.is_begun {
            self.is_begun = true;
            match incoming.begin(store) {
                Ok(file) => self.file = file,
                Err(error) => self.errno = Some(error.raw_os_error()),
            }
        }
        let Some(file) = &mut self.file else {
            return false;
        };
        match incoming.write(file, &store.dataset[self.written..], is_last) {
            Ok(count) => {
                self.written += count;
                count > 0
            }
            Err(error) => {
                // What it took is free again at once.
                self.file = None;
                self.errno = Some(error.raw_os_error());
                false
            }
        }
    }
}

/// Of its first element, little endian.
const GROUP_OF_META: &[u8] = b"\x02\x00";
/// After so many bytes the caller looks how much memory is taken.
const MOST_UNSEEN: u64 = 32 << 20;
/// So long what the node has to know of an image may wait for the next one.
const AHEAD: Duration = Duration::from_millis(20);
/// So long after an image of another connection, several bring images at the same time.
const TOGETHER: u64 = 50;
static CROWD: Crowd = Crowd {
    newest: AtomicUsize::new(0),
    until: AtomicU64::new(0),
};

/// Whether several connections bring images at the same time.
struct Crowd {
    /// The address of the connection that brought the newest one.
    newest: AtomicUsize,
    /// Until when they do, in milliseconds of the process.
    until: AtomicU64,
}

impl Crowd {
    fn came(&self, connection: &Arc<Connection>) {
        let address = Arc::as_ptr(connection).addr();
        if self.newest.swap(address, Ordering::Relaxed) != address {
            self.until
                .store(milliseconds() + TOGETHER, Ordering::Relaxed);
        }
    }

    fn is_there(&self) -> bool {
        milliseconds() < self.until.load(Ordering::Relaxed)
    }
}

fn milliseconds() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// An image that is whole.
struct Arrived {
    store: core::Store,
    kept: Kept,
    dataset: Arc<Bytes>,
    digest: Coming,
    known: Option<Known>,
}

/// What an image says of itself.
struct Known {
    header: scan::Header,
    /// Where nothing of it has to be looked at closer.
    names: Option<Ordinary>,
}

enum Outcome {
    Nothing,
    Closed,
    Pass(Vec<u8>),
    Store(Box<Arrived>),
}

#[pymethods]
impl Receiver {
    #[new]
    #[pyo3(signature = (
        contexts, pdu, dataset, memory, socket = None, wake = None, digest_size = 32, folder = None,
        least_free = 0, title = "", identifier_tag = 0x0010_0020, named_above = None,
    ))]
    #[expect(clippy::too_many_arguments, reason = "they have names in Python")]
    fn new(
        contexts: Vec<(u8, String)>,
        pdu: u32,
        dataset: u64,
        memory: usize,
        socket: Option<c_int>,
        wake: Option<c_int>,
        digest_size: usize,
        folder: Option<PathBuf>,
        least_free: u64,
        title: &str,
        identifier_tag: u32,
        named_above: Option<u64>,
    ) -> PyResult<Self> {
        let kind = kind_of(digest_size)?;
        if socket.is_some() && wake.is_none() {
            return Err(PyValueError::new_err(
                "expected a descriptor that wakes, since there is a socket",
            ));
        }
        // Without a socket nobody waits here.
        let wake = wake.filter(|_| socket.is_some());
        let (socket, wake) = (duplicated(socket)?, duplicated(wake)?);
        let limits = core::Limits {
            pdu,
            dataset,
            memory,
        };
        let numbers = contexts.iter().map(|(number, _)| *number).collect();
        let incoming = folder.map(|folder| {
            let syntaxes = contexts.clone();
            Incoming::new(folder, least_free, title.to_owned(), syntaxes, named_above)
        });
        Ok(Receiver(Arc::new(Connection {
            state: Mutex::new(State {
                parser: core::Receiver::new(numbers, limits, kind),
                incoming,
                kept: Kept::default(),
                ahead: None,
            }),
            answers: Mutex::new(Answers {
                socket: socket.map(Arc::new),
                wake: wake.map(Arc::new),
                unsent: Vec::new(),
                is_new: false,
            }),
            kind,
            contexts,
            tag: identifier_tag,
            arriving: AtomicUsize::new(0),
            is_arriving: AtomicBool::new(false),
            is_large: AtomicBool::new(false),
            total: AtomicU64::new(0),
        })))
    }

    /// Bytes of the dataset that is arriving which are in memory.
    #[getter]
    fn arriving(&self) -> usize {
        self.0.arriving.load(Ordering::Relaxed)
    }

    /// Whether an image has begun to arrive, or has arrived and is not dealt with.
    #[getter]
    fn is_arriving(&self) -> bool {
        self.0.is_arriving.load(Ordering::Relaxed)
    }

    /// Whether the dataset that is arriving is too large for memory.
    #[getter]
    fn is_large(&self) -> bool {
        self.0.is_large.load(Ordering::Relaxed)
    }

    /// Bytes that ever came.
    #[getter]
    fn total(&self) -> u64 {
        self.0.total.load(Ordering::Relaxed)
    }

    /// Whether a message has begun and is not whole, or is here and was not asked for.
    #[getter]
    fn is_within(&self) -> bool {
        let state = self.0.lock();
        state.ahead.is_some() || state.parser.is_within()
    }

    /// What of the last answers was not sent; all of it without a socket.
    fn unsent<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &std::mem::take(&mut locked(&self.0.answers).unsent))
    }

    /// The image that has arrived is dealt with, as it is also where more is read.
    fn answered(&self) {
        self.0.begin(&mut self.0.lock());
    }

    /// Keep no more of a dataset that is too large for memory; the request then tells `errno`.
    fn discard(&self, errno: i32) {
        let mut state = self.0.lock();
        if state.kept.is_large {
            state.kept.file = None;
            state.kept.errno = Some(errno);
        }
    }

    /// Close the duplicates of socket and `wake`, and the files of what is being written and of what may come next.
    fn close(&self, py: Python<'_>) {
        let mut state = self.0.lock();
        let mut answers = locked(&self.0.answers);
        (answers.socket, answers.wake) = (None, None);
        drop(answers);
        let ahead = state.ahead.take();
        let kept = std::mem::take(&mut state.kept);
        let rest = state.incoming.as_mut().map(Incoming::rest);
        drop(state);
        // The system takes its time to free them.
        py.detach(|| drop((ahead, kept, rest)));
        self.0.is_arriving.store(false, Ordering::Relaxed);
        self.0.is_large.store(false, Ordering::Relaxed);
    }

    /// Read from the socket until something is whole.
    ///
    /// After an answer, and with a folder, the file of the next image may be opened already. Where some of the answer is
    /// unsent, nothing is read. A request gives `Received`, any other PDU its bytes, a closed connection empty bytes. None
    /// after `seconds` or 32 MiB, or as soon as `wake` can be read.
    ///
    /// Raises InvalidDicom for what breaks the protocol or a limit, and OSError.
    fn receive<'py>(&self, py: Python<'py>, seconds: f64) -> PyResult<Option<Bound<'py, PyAny>>> {
        let connection = &self.0;
        if locked(&connection.answers).socket.is_none() {
            return Err(PyValueError::new_err("expected a receiver with a socket"));
        }
        if !(0.0..=3600.0).contains(&seconds) {
            return Err(PyValueError::new_err("expected 0 to 3600 seconds"));
        }
        if !locked(&connection.answers).unsent.is_empty() {
            return Ok(None);
        }
        let mut state = connection.lock();
        let ahead = state.ahead.take();
        if ahead.is_some() {
            connection.arriving.store(0, Ordering::Relaxed);
        }
        if ahead
            .as_ref()
            .is_some_and(|one| !matches!(one, Ok(Outcome::Store(_))))
        {
            connection.begin(&mut state);
        }
        drop(state);
        let outcome = match ahead {
            Some(outcome) => attached(py, || outcome)?,
            None => {
                let end = Instant::now() + Duration::from_secs_f64(seconds);
                detached(py, || connection.read(end, true))?
            }
        };
        Connection::given(connection, py, outcome)
    }

    /// The same for bytes that the caller has read; None where they make nothing whole.
    fn offer<'py>(&self, py: Python<'py>, data: &[u8]) -> PyResult<Option<Bound<'py, PyAny>>> {
        let outcome = detached(py, || self.0.take(data))?;
        Connection::given(&self.0, py, outcome)
    }
}

impl Connection {
    /// What was whole is dealt with.
    fn begin(&self, state: &mut State) {
        let has_more = state.parser.arriving().is_some() || state.ahead.is_some();
        self.is_arriving.store(has_more, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// What came, for the interpreter.
    fn given<'py>(
        connection: &Arc<Self>,
        py: Python<'py>,
        outcome: Outcome,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        match outcome {
            Outcome::Nothing => Ok(None),
            Outcome::Closed => Ok(Some(PyBytes::new(py, b"").into_any())),
            Outcome::Pass(pdu) => Ok(Some(PyBytes::new(py, &pdu).into_any())),
            Outcome::Store(arrived) => {
                let received = Received {
                    digest: arrived.digest,
                    reply: Arc::new(Reply {
                        store: arrived.store,
                        connection: Arc::clone(connection),
                        status: Mutex::new(None),
                    }),
                    dataset: arrived.dataset,
                    is_large: arrived.kept.is_large,
                    errno: arrived.kept.errno,
                    file: Mutex::new(arrived.kept.file),
                    known: Mutex::new(arrived.known),
                };
                CROWD.came(connection);
                Ok(Some(Bound::new(py, received)?.into_any()))
            }
        }
    }

    /// Parse bytes that somebody else has read.
    fn take(&self, mut left: &[u8]) -> Result<Outcome> {
        let mut guard = self.lock();
        let state = &mut *guard;
        self.begin(state);
        while !left.is_empty() {
            let room = state.parser.room();
            let count = room.len().min(left.len());
            room[..count].copy_from_slice(&left[..count]);
            state.parser.filled(count)?;
            self.total.fetch_add(count as u64, Ordering::Relaxed);
            left = &left[count..];
        }
        Ok(self.step(state)?.unwrap_or(Outcome::Nothing))
    }

    /// Read what comes next, unless that takes longer, and have it ready for whoever asks.
    fn read_ahead(&self) {
        if locked(&self.answers).socket.is_none() {
            // Somebody else reads.
            return;
        }
        let outcome = self.read(Instant::now() + AHEAD, false);
        if let Ok(Outcome::Store(image)) = &outcome {
            self.arriving.store(image.dataset.len(), Ordering::Relaxed);
        }
        if !matches!(outcome, Ok(Outcome::Nothing)) {
            self.lock().ahead = Some(outcome);
        }
    }

    /// Read until something is whole; `is_dealt_with` tells of what was whole before.
    fn read(&self, end: Instant, is_dealt_with: bool) -> Result<Outcome> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let answers = locked(&self.answers);
        let (Some(socket), Some(wake)) = (answers.socket.clone(), answers.wake.clone()) else {
            return Ok(Outcome::Closed);
        };
        if !answers.unsent.is_empty() {
            return Ok(Outcome::Nothing);
        }
        drop(answers);
        let (socket, wake) = (socket.as_fd(), wake.as_fd());
        let before = self.total.load(Ordering::Relaxed);
        if is_dealt_with {
            self.begin(state);
        } else {
            locked(&self.answers).is_new = true;
        }
        loop {
            if let Some(outcome) = self.step(state)? {
                return Ok(outcome);
            }
            let outcome = recv(socket, state.parser.room(), RecvFlags::DONTWAIT);
            match outcome {
                Ok((_, count)) => {
                    state.parser.filled(count)?;
                    if count == 0 {
                        return Ok(Outcome::Closed);
                    }
                    let total = self.total.fetch_add(count as u64, Ordering::Relaxed);
                    if Instant::now() >= end || total - before > MOST_UNSEEN {
                        return Ok(self.step(state)?.unwrap_or(Outcome::Nothing));
                    }
                }
                Err(error) => {
                    state.parser.filled(0)?;
                    match error {
                        Errno::INTR => {}
                        Errno::AGAIN => {
                            // A sender with Nagle's algorithm waits for our acknowledgement.
                            let _ = set_tcp_quickack(socket, true);
                            // Another image is likely, and comes sooner to a file that is there.
                            if std::mem::take(&mut locked(&self.answers).is_new)
                                && let Some(incoming) = &mut state.incoming
                            {
                                incoming.prepare();
                            }
                            if !wait(socket, wake, end)? {
                                return Ok(Outcome::Nothing);
                            }
                        }
                        error => return Err(io(error)),
                    }
                }
            }
        }
    }

    /// What an image says; None where somebody else has to find out, or why it cannot be understood.
    fn known(&self, store: &core::Store, dataset: &Bytes, is_large: bool) -> Option<Known> {
        let mut contexts = self.contexts.iter();
        let (_, syntax) = contexts.find(|(number, _)| *number == store.context)?;
        if is_large || scan::is_deflated(syntax) {
            return None;
        }
        let header = scan::scan(Source::Bytes(dataset), Some(syntax)).ok()?;
        let names = self.ordinary(store, dataset, &header);
        Some(Known { header, names })
    }

    fn ordinary(
        &self,
        store: &core::Store,
        dataset: &Bytes,
        header: &scan::Header,
    ) -> Option<Ordinary> {
        let class = std::str::from_utf8(&store.sop_class_uid).ok()?;
        let uid = std::str::from_utf8(&store.sop_instance_uid).ok()?;
        if !is_uid(uid) || dataset.starts_with(GROUP_OF_META) {
            return None;
        }
        let found = names::ordinary(header, Some(dataset), class, uid, self.tag);
        let missing = extent::missing_pixels(header, Some(dataset));
        found.ok()?.filter(|_| matches!(missing, Ok(0)))
    }

    /// What is whole by now; None where more bytes are needed.
    fn step(&self, state: &mut State) -> Result<Option<Outcome>> {
        let State {
            parser,
            incoming,
            kept,
            ..
        } = state;
        loop {
            let step = parser.step()?;
            let held = parser.arriving().map_or(0, |one| one.dataset.len());
            if parser.arriving().is_some() || matches!(step, core::Step::Store(_)) {
                self.is_arriving.store(true, Ordering::Relaxed);
            }
            self.arriving.store(held, Ordering::Relaxed);
            match step {
                core::Step::Hungry => {
                    if let Some(store) = parser.arriving()
                        && held > 0
                        && kept.write(incoming.as_mut(), store, false)
                        && self.kind == Kind::Blake3
                    {
                        parser.digest_along();
                    }
                    return Ok(None);
                }
                core::Step::Pass(pdu) => return Ok(Some(Outcome::Pass(pdu))),
                core::Step::Full => {
                    if let Some(store) = parser.arriving() {
                        kept.write(incoming.as_mut(), store, true);
                    }
                    kept.is_large = true;
                    self.is_large.store(true, Ordering::Relaxed);
                    drop(parser.take());
                    kept.written = 0;
                }
                core::Step::Store(mut store) => {
                    kept.write(incoming.as_mut(), &store, true);
                    if kept.is_large {
                        self.is_large.store(false, Ordering::Relaxed);
                        store.dataset = Bytes::default();
                    }
                    let dataset = Arc::new(std::mem::take(&mut store.dataset));
                    let digest = match store.digest.take() {
                        Some(digest) => Coming::known(self.kind, digest),
                        None => hashing::begin(self.kind, &dataset),
                    };
                    let kept = std::mem::take(kept);
                    let known = self.known(&store, &dataset, kept.is_large);
                    return Ok(Some(Outcome::Store(Box::new(Arrived {
                        store: *store,
                        kept,
                        dataset,
                        digest,
                        known,
                    }))));
                }
            }
        }
    }
}

/// An open descriptor of the caller, for as long as it is needed here.
fn duplicated(number: Option<c_int>) -> PyResult<Option<OwnedFd>> {
    match number {
        None => Ok(None),
        Some(number) if number < 0 => Err(PyValueError::new_err("expected an open descriptor")),
        // SAFETY: the caller keeps it open during this call.
        Some(number) => Ok(Some(
            unsafe { BorrowedFd::borrow_raw(number) }.try_clone_to_owned()?,
        )),
    }
}

/// Send as much as a socket takes at once; what is left. An error shows when it is read.
fn rest_of(socket: BorrowedFd<'_>, answer: &[u8]) -> Vec<u8> {
    if answer.is_empty() {
        return Vec::new();
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    answer[send(socket, answer, flags).unwrap_or(0)..].to_vec()
}

/// Whether there is something to read before `end`; false also where `wake` can be read.
fn wait(socket: BorrowedFd<'_>, wake: BorrowedFd<'_>, end: Instant) -> Result<bool> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let mut both = [
            PollFd::from_borrowed_fd(socket, PollFlags::IN),
            PollFd::from_borrowed_fd(wake, PollFlags::IN),
        ];
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(3600),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut both, Some(&timeout)) {
            Ok(_) if !both[1].revents().is_empty() => return Ok(false),
            Ok(_) if !both[0].revents().is_empty() => return Ok(true),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(io(error)),
        }
    }
}

fn io(error: Errno) -> Error {
    Error::io(Path::new("association"), error.into())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A C-STORE request with its dataset.
#[pyclass(frozen, module = "dicomnode._core")]
pub struct Received {
    reply: Arc<Reply>,
    dataset: Arc<Bytes>,
    /// Made while the image is routed and written.
    digest: Coming,
    is_large: bool,
    errno: Option<i32>,
    file: Mutex<Option<Growing>>,
    known: Mutex<Option<Known>>,
}

/// How a request is answered.
pub struct Reply {
    store: core::Store,
    connection: Arc<Connection>,
    status: Mutex<Option<u16>>,
}

impl Reply {
    /// Answer it, unless it was answered.
    pub fn give(&self, status: u16, comment: &str, offending: u32) {
        let mut given = locked(&self.status);
        if given.is_none() {
            *given = Some(status);
            let response = self.store.response(status, comment, offending);
            locked(&self.connection.answers).give(&response);
        }
    }

    /// Where others want the interpreter as well: read what comes next, for a moment.
    pub fn read_ahead(&self) {
        if CROWD.is_there() {
            self.connection.read_ahead();
        }
    }
}

impl Received {
    /// How it is answered.
    pub fn reply(&self) -> Arc<Reply> {
        Arc::clone(&self.reply)
    }

    /// Whether its file has that name, and it is on the disk.
    pub fn is_named(&self, name: &str) -> bool {
        let file = locked(&self.file);
        file.as_ref().and_then(Growing::durable_name) == Some(name)
    }

    /// Let its file keep that name.
    pub fn keep_name_ahead(&self) {
        if let Some(file) = locked(&self.file).as_mut() {
            file.stay();
        }
    }

    /// How many bytes its digest has.
    pub fn digest_size(&self) -> usize {
        self.digest.size()
    }

    /// Its digest in hexadecimal digits.
    pub fn digest_text(&self) -> String {
        let known = self.digest.now();
        let digest = known.unwrap_or_else(|| self.digest.wait(&self.dataset));
        let nibbles = digest.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        nibbles
            .map(|one| char::from(b"0123456789abcdef"[usize::from(one)]))
            .collect()
    }
}

#[pymethods]
impl Received {
    /// Presentation context ID.
    #[getter]
    fn context_id(&self) -> u8 {
        self.reply.store.context
    }

    /// (0000,0002), whatever it may be.
    #[getter]
    fn sop_class_uid(&self) -> String {
        text(&self.reply.store.sop_class_uid)
    }

    /// (0000,1000), whatever it may be.
    #[getter]
    fn sop_instance_uid(&self) -> String {
        text(&self.reply.store.sop_instance_uid)
    }

    /// Bytes of the dataset.
    #[getter]
    fn size(&self) -> u64 {
        self.reply.store.size
    }

    /// The digest of the dataset.
    #[getter]
    fn digest<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let known = self.digest.now();
        let digest = known.unwrap_or_else(|| py.detach(|| self.digest.wait(&self.dataset)));
        PyBytes::new(py, &digest)
    }

    /// Whether the dataset was too large for memory, and is at best in its file.
    #[getter]
    fn is_large(&self) -> bool {
        self.is_large
    }

    /// The descriptor of its file, until `close`, and how many bytes it has to have. None without a file.
    #[getter]
    fn file(&self) -> Option<(RawFd, u64)> {
        let file = locked(&self.file);
        let file = file.as_ref()?;
        Some((
            file.as_fd().as_raw_fd(),
            file.start() + self.reply.store.size,
        ))
    }

    /// The name in the folder of the `Receiver` that its file has, if that is on the disk; it is deleted by `close`, unless
    /// `JournalFile.keep` has said that it stays.
    #[getter]
    fn name_ahead(&self) -> Option<String> {
        let file = locked(&self.file);
        file.as_ref()?.durable_name().map(str::to_owned)
    }

    /// Close its file; unless it was linked nothing is left of it.
    fn close(&self, py: Python<'_>) {
        let file = locked(&self.file).take();
        if let Some(file) = file
            && (self.is_large || file.has_name())
        {
            // The system takes its time to free it, or to delete the name.
            py.detach(|| drop(file));
        }
    }

    /// Its header, and of an ordinary image identifier and name; once, and None where it has to be scanned.
    ///
    /// Ordinary is an image that is the one its sender said, has a UID, all its uncompressed pixels and no file meta
    /// information in the dataset, and plain values of the identifier, of Modality and of InstanceNumber. The name is
    /// `Image_<modality>_<instance number>`.
    fn known(&self) -> Option<(Header, Option<(String, String)>)> {
        let known = locked(&self.known).take()?;
        let header = Header::new(known.header, Owner::Dataset(Arc::clone(&self.dataset)));
        Some((header, known.names.map(|one| (one.identifier, one.stem))))
    }

    /// The number of the error because of which its file is not whole.
    #[getter]
    fn errno(&self) -> Option<i32> {
        self.errno
    }

    /// Answer it, unless it was answered; `unsent` of its `Receiver` has what the socket did not take at once.
    #[pyo3(signature = (status, comment = "", offending = 0))]
    fn answer(&self, py: Python<'_>, status: u16, comment: &str, offending: u32) {
        if self.status().is_none() {
            py.detach(|| self.reply.give(status, comment, offending));
        }
    }

    /// The status that it was answered with; None where it was not answered.
    #[getter]
    fn status(&self) -> Option<u16> {
        *locked(&self.reply.status)
    }

    /// The bytes of a C-STORE-RSP (PS3.7 section 9.3.1.2).
    #[pyo3(signature = (status, comment = "", offending = 0))]
    fn response<'py>(
        &self,
        py: Python<'py>,
        status: u16,
        comment: &str,
        offending: u32,
    ) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.reply.store.response(status, comment, offending))
    }

    /// The first eight bytes of the dataset, as far as it is in memory.
    #[getter]
    fn head<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.dataset[..self.dataset.len().min(8)])
    }

    /// The bytes of the dataset.
    #[getter]
    fn data<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyMemoryView>> {
        PyMemoryView::from(slf.as_any())
    }

    /// # Safety
    /// Called by the interpreter with a view to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let bytes = &slf.get().dataset;
        // SAFETY: the bytes live as long as the object that the view refers to and never change, and
        // the view is read-only.
        let failed = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                bytes.as_ptr().cast_mut().cast(),
                ffi::Py_ssize_t::try_from(bytes.len()).unwrap_or(ffi::Py_ssize_t::MAX),
                1,
                flags,
            )
        };
        if failed == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}

/// Give an open file of `size` bytes a name in a folder, also one without any; false where the name is taken.
///
/// With `flush` the file is durable before it has the name, and the name then, or it is not there. Raises
/// OSError, also where it has another size.
#[pyfunction]
pub fn link(
    py: Python<'_>,
    descriptor: c_int,
    size: u64,
    folder: PathBuf,
    name: &str,
    flush: bool,
) -> PyResult<bool> {
    if descriptor < 0 {
        return Err(PyValueError::new_err("expected an open descriptor"));
    }
    detached(py, || {
        // SAFETY: the caller keeps it open meanwhile.
        let opened = unsafe { BorrowedFd::borrow_raw(descriptor) };
        let flush = if flush { Flush::All } else { Flush::Nothing };
        incoming::link(opened, size, &folder, name, flush)
            .map_err(|error| Error::io(Path::new(name), error))
    })
}

/// Preamble, `DICM` and File Meta Information (PS3.10 section 7.1) for a received dataset.
#[pyfunction]
#[pyo3(signature = (sop_class_uid, sop_instance_uid, transfer_syntax_uid, source_ae_title = ""))]
pub fn part10_prefix<'py>(
    py: Python<'py>,
    sop_class_uid: &str,
    sop_instance_uid: &str,
    transfer_syntax_uid: &str,
    source_ae_title: &str,
) -> Bound<'py, PyBytes> {
    let made = prefix(
        sop_class_uid,
        sop_instance_uid,
        transfer_syntax_uid,
        source_ae_title,
    );
    PyBytes::new(py, &made)
}
