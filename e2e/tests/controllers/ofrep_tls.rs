//! OFREP with TLS: which certificate is shown, and that a change of it costs nothing.

use crate::{
    ofrep::{address, flags, prepared},
    support::{eventually, operator::Operator},
};
use serde_json::Value;
use std::{path::Path, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    },
};

/// A certificate of its own authority, and its key, as PEM.
fn pair() -> (String, String) {
    let signed = rcgen::generate_simple_self_signed(["flags.example".to_owned()]).unwrap();
    (signed.cert.pem(), signed.signing_key.serialize_pem())
}

fn write(folder: &Path, chain: &str, key: &str) {
    std::fs::write(folder.join("tls.crt"), chain).unwrap();
    std::fs::write(folder.join("tls.key"), key).unwrap();
}

/// What `request` is answered, for a client that trusts this certificate alone, which is of `flags.example`.
pub async fn ask(listen: &str, trusted: &str, request: &str) -> Result<String, String> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(trusted.as_bytes()).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
    let connector = TlsConnector::from(Arc::new(config.with_no_client_auth()));
    let stream = TcpStream::connect(listen).await.map_err(|error| error.to_string())?;
    let name = ServerName::try_from("flags.example").unwrap();
    let mut stream = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.map_err(|error| error.to_string())?;
    Ok(answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_read_again_when_it_changes_and_a_bad_one_is_not_taken() {
    let world = prepared().await;
    let folder = tempfile::tempdir().unwrap();
    let listen = address();
    let extra = ["--ofrep-listen", &listen, "--ofrep-certificates", folder.path().to_str().unwrap()];
    let operator = Operator::start(&world, &extra).await;
    world.apply(&flags()).await;
    let token = world.cluster.server.user_token("user-1").unwrap();
    let body = "{\"context\": {}}";
    let request = format!(
        "POST /namespaces/{}/ofrep/v1/evaluate/flags/EnablePdf HTTP/1.1\r\nhost: flags.example\r\nauthorization: Bearer {token}\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        world.namespace,
        body.len(),
    );
    let ((first, first_key), (second, second_key)) = (pair(), pair());
    let reads = async |result: &str| {
        let name = format!("resilience_operator_ofrep_certificate_reads_total{{result=\"{result}\"}}");
        operator.metric(&name).await
    };
    let until_served = async |chain: &str| {
        eventually("it is served with this certificate", async || {
            let answer = ask(&listen, chain, &request).await?;
            let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| answer.clone())?;
            let body: Value = serde_json::from_str(body).map_err(|_| answer.clone())?;
            if head.starts_with("HTTP/1.1 200") && body["value"] == true { Ok(()) } else { Err(answer.clone()) }
        })
        .await;
    };
    eventually("the missing certificate is noticed", async || match reads("error").await {
        0 => Err("not yet".to_owned()),
        _ => Ok(()),
    })
    .await;
    let (status, _) = operator.readiness().await;
    assert!(ask(&listen, &first, &request).await.is_err(), "nobody is served without TLS");
    write(folder.path(), &first, &first_key);
    until_served(&first).await;
    let errors = reads("error").await;
    write(folder.path(), &second, &first_key);
    eventually("the bad one is noticed", async || match reads("error").await {
        now if now > errors => Ok(()),
        _ => Err("not yet".to_owned()),
    })
    .await;
    until_served(&first).await;
    write(folder.path(), &second, &second_key);
    until_served(&second).await;
    assert!(ask(&listen, &first, &request).await.is_err());
    operator.assert_alive().await;
    assert!(status || operator.readiness().await.0, "flags are not what the operator is there for");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_speak_tls_gets_nothing_and_holds_up_nobody() {
    let world = prepared().await;
    let folder = tempfile::tempdir().unwrap();
    let (chain, key) = pair();
    write(folder.path(), &chain, &key);
    let listen = address();
    let extra = ["--ofrep-listen", &listen, "--ofrep-certificates", folder.path().to_str().unwrap()];
    let operator = Operator::start(&world, &extra).await;
    let request = "GET /x HTTP/1.1\r\nhost: flags.example\r\nconnection: close\r\n\r\n";
    eventually("it is served", async || ask(&listen, &chain, request).await).await;
    let mut silent = TcpStream::connect(&listen).await.unwrap();
    let mut plain = TcpStream::connect(&listen).await.unwrap();
    plain.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    assert!(ask(&listen, &chain, request).await.unwrap().starts_with("HTTP/1.1 404"));
    // One that says nothing is given up.
    let ended = tokio::time::timeout(Duration::from_secs(30), silent.read_to_end(&mut answer)).await;
    assert!(ended.is_ok(), "the handshake is bounded");
    operator.assert_alive().await;
}
