//! The least that receiving takes: `receive_floor FOLDER power|process` prints its port and takes C-STORE requests.
//!
//! The problem: how far is a node from what the machine can do? This keeps what a node promises (each image whole in
//! a file with its digest, its name in a folder, and a record in the journal, with `power` all of it flushed, or of a small image the
//! record with all bytes) with the node's parser, files and journal, and does nothing else. It never brings anything up to the
//! journal, has no interpreter, looks at no header, routes nothing, and believes its peer: never use it but to measure. It ends with
//! its standard input.

use std::error::Error;
use std::fs::{File, create_dir_all};
use std::hint::black_box;
use std::io::{Read, Write, stdin};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use dicomnode_core::digest::Kind;
use dicomnode_core::hashing::{self, Coming};
use dicomnode_core::incoming::{Flush, Incoming, link};
use dicomnode_core::journal::{JournalFile, NONCE};
use dicomnode_core::receive::{Limits, Receiver, Step};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Where the items of an association request begin, without the head of the PDU.
const ITEMS: usize = 68;

/// Bytes of the journal, and of the largest image in it.
const JOURNAL: u64 = 4 << 20;
const SMALL: u64 = 64 << 10;
/// As long as the text of a record is.
const TEXT: [u8; 200] = [b' '; 200];

/// The journal, which is begun again when it is full.
struct Log {
    file: File,
    flush: bool,
    journal: Mutex<Arc<JournalFile>>,
}

impl Log {
    fn new(file: File, flush: bool) -> Outcome<Self> {
        let journal = Mutex::new(Arc::new(Self::begun(&file, flush)?));
        Ok(Log {
            file,
            flush,
            journal,
        })
    }

    fn begun(file: &File, flush: bool) -> Outcome<JournalFile> {
        let file = file.try_clone()?.into();
        Ok(JournalFile::new(file, [1; NONCE], 0, JOURNAL, flush))
    }

    fn append(&self, image: Option<(BorrowedFd<'_>, usize)>) -> Outcome<()> {
        loop {
            let journal = Arc::clone(&self.lock());
            if journal.append(&journal.record(&TEXT, image)?)? {
                return Ok(());
            }
            let mut current = self.lock();
            if Arc::ptr_eq(&current, &journal) {
                *current = Arc::new(Self::begun(&self.file, self.flush)?);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Arc<JournalFile>> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn item(kind: u8, value: &[u8]) -> Outcome<Vec<u8>> {
    let length = u16::try_from(value.len())?.to_be_bytes();
    Ok([&[kind, 0], &length[..], value].concat())
}

/// Type and value of each item (PS3.8 section 9.3).
fn items(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
    let mut found = Vec::new();
    while let [kind, _, high, low, rest @ ..] = bytes {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
        found.push((*kind, &rest[..length]));
        bytes = &rest[length..];
    }
    found
}

/// Accept the first transfer syntax of each context; the contexts.
fn negotiate(peer: &mut TcpStream) -> Outcome<Vec<(u8, String)>> {
    let mut head = [0; 6];
    peer.read_exact(&mut head)?;
    let length = u32::from_be_bytes([head[2], head[3], head[4], head[5]]);
    let mut request = vec![0; usize::try_from(length)?];
    peer.read_exact(&mut request)?;
    let (mut contexts, mut answer) = (Vec::new(), Vec::new());
    for (kind, value) in items(request.get(ITEMS..).unwrap_or_default()) {
        if kind == 0x10 {
            answer.extend(item(kind, value)?);
        } else if kind == 0x20 && value.len() > 4 {
            let syntaxes = items(&value[4..]);
            let first = syntaxes.iter().find(|one| one.0 == 0x40);
            let (_, syntax) = first.ok_or("a context without a transfer syntax")?;
            contexts.push((value[0], String::from_utf8_lossy(syntax).into_owned()));
            let accepted = [&[value[0], 0, 0, 0], &item(0x40, syntax)?[..]].concat();
            answer.extend(item(0x21, &accepted)?);
        }
    }
    let largest = item(0x51, &131_072_u32.to_be_bytes())?;
    answer.extend(item(0x50, &[largest, item(0x52, b"2.25.1")?].concat())?);
    let length = u32::try_from(ITEMS + answer.len())?.to_be_bytes();
    peer.write_all(&[&[2, 0], &length[..], &request[..ITEMS], &answer].concat())?;
    Ok(contexts)
}

fn serve(mut peer: TcpStream, root: &Path, number: usize, flush: bool, log: &Log) -> Outcome<()> {
    peer.set_nodelay(true)?;
    let contexts = negotiate(&mut peer)?;
    let kind = if flush { Kind::Sha256 } else { Kind::Blake3 };
    let limits = Limits {
        pdu: 132_096,
        dataset: 1 << 30,
        memory: 1 << 30,
    };
    let numbers = contexts.iter().map(|one| one.0).collect();
    let mut receiver = Receiver::new(numbers, limits, kind);
    let named_above = flush.then_some(SMALL);
    let folder = root.join("incoming");
    let mut incoming = Incoming::new(folder, 0, "FLOOR".to_owned(), contexts, named_above);
    let (mut growing, mut written, mut count) = (None, 0, 0_u32);
    loop {
        match receiver.step()? {
            Step::Hungry => {
                if let Some(store) = receiver.arriving()
                    && !store.dataset.is_empty()
                {
                    if growing.is_none() {
                        growing = incoming.begin(store)?;
                    }
                    let file = growing.as_mut().ok_or("an image without a UID")?;
                    let more = incoming.write(file, &store.dataset[written..], false)?;
                    written += more;
                    if more > 0 && kind == Kind::Blake3 {
                        receiver.digest_along();
                    }
                }
                let read = peer.read(receiver.room())?;
                receiver.filled(read)?;
                if read == 0 {
                    return Ok(());
                }
            }
            Step::Store(mut store) => {
                let taken = match growing.take() {
                    Some(file) => Some(file),
                    None => incoming.begin(&store)?,
                };
                let mut file = taken.ok_or("an image without a UID")?;
                incoming.write(&mut file, &store.dataset[written..], true)?;
                written = 0;
                let dataset = Arc::new(std::mem::take(&mut store.dataset));
                let coming = match store.digest.take() {
                    None => hashing::begin(kind, &dataset),
                    Some(digest) => Coming::known(kind, digest),
                };
                let name = format!("Image_CT_{number}_{count}.dcm");
                count += 1;
                let size = file.start() + store.size;
                let is_small = flush && size <= SMALL;
                let folder = root.join("patient/images");
                let flushed = match file.durable_name() {
                    _ if is_small || !flush => Flush::Nothing,
                    Some(_) => Flush::File,
                    None => Flush::All,
                };
                link(file.as_fd(), size, &folder, &name, flushed)?;
                black_box(coming.wait(&dataset));
                let image = Some((file.as_fd(), usize::try_from(size)?));
                log.append(image.filter(|_| is_small))?;
                if flushed == Flush::File {
                    file.stay();
                }
                peer.write_all(&store.response(0, "", 0))?;
                incoming.prepare();
            }
            // A request for a release.
            Step::Pass(pdu) if pdu[0] == 5 => {
                peer.write_all(&[6, 0, 0, 0, 0, 4, 0, 0, 0, 0])?;
                let _ = peer.read(&mut [0]);
                return Ok(());
            }
            Step::Pass(_) | Step::Full => return Err("not an image".into()),
        }
    }
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, root, durability] = arguments.as_slice() else {
        return Err("usage: receive_floor FOLDER power|process".into());
    };
    let (root, flush) = (PathBuf::from(root), durability == "power");
    create_dir_all(root.join("incoming"))?;
    create_dir_all(root.join("patient/images"))?;
    let path = root.join("log");
    let mut file = File::create(path)?;
    file.write_all(&vec![0; usize::try_from(JOURNAL)?])?;
    file.sync_all()?;
    let log = Arc::new(Log::new(file, flush)?);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?.port());
    thread::spawn(|| {
        let _ = stdin().read(&mut [0]);
        std::process::exit(0);
    });
    for (number, peer) in listener.incoming().enumerate() {
        let (peer, root, log) = (peer?, root.clone(), Arc::clone(&log));
        thread::spawn(move || {
            if let Err(error) = serve(peer, &root, number, flush, &log) {
                eprintln!("{error}");
            }
        });
    }
    Ok(())
}
