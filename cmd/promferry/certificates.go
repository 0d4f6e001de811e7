package main

import (
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v2"

	"github.com/promferry/promferry/internal/httpclient"
)

// credentialsCollector tells when certificates of ours expire, and where a client checks none.
type credentialsCollector struct {
	webConfigs []string
	clients    []*httpclient.Client
}

var (
	expiryDesc = prometheus.NewDesc("promferry_certificate_expiry_timestamp_seconds",
		"When a certificate that is shown to others expires, in Unix time.", []string{"file"}, nil)
	insecureDesc = prometheus.NewDesc("promferry_insecure_skip_verify",
		"Whether an http_config file switches off the check of servers' certificates.", []string{"file"}, nil)
)

func (credentialsCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- expiryDesc
	ch <- insecureDesc
}

func (c credentialsCollector) Collect(ch chan<- prometheus.Metric) {
	var files []string
	for _, file := range c.webConfigs {
		if cert := serverCertificate(file); cert != "" {
			files = append(files, cert)
		}
	}
	insecure := make(map[string]float64)
	for _, client := range c.clients {
		file, use := client.Uses()
		if use.Certificate != "" {
			files = append(files, use.Certificate)
		}
		if file != "" {
			insecure[file] = 0
			if use.Insecure {
				insecure[file] = 1
			}
		}
	}
	slices.Sort(files)
	for _, file := range slices.Compact(files) {
		if expiry, ok := notAfter(file); ok {
			ch <- prometheus.MustNewConstMetric(expiryDesc, prometheus.GaugeValue, expiry, file)
		}
	}
	for file, value := range insecure {
		ch <- prometheus.MustNewConstMetric(insecureDesc, prometheus.GaugeValue, value, file)
	}
}

// serverCertificate returns the certificate file of a web configuration file, or "".
func serverCertificate(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	var config struct {
		TLS struct {
			CertFile string `yaml:"cert_file"`
		} `yaml:"tls_server_config"`
	}
	if yaml.Unmarshal(b, &config) != nil || config.TLS.CertFile == "" || filepath.IsAbs(config.TLS.CertFile) {
		return config.TLS.CertFile
	}
	return filepath.Join(filepath.Dir(file), config.TLS.CertFile)
}

// notAfter returns when the first certificate of a PEM file expires.
func notAfter(file string) (float64, bool) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return 0, false
			}
			return float64(cert.NotAfter.Unix()), true
		}
	}
	return 0, false
}

// warnExposed warns of files with secrets that every user of the host can read.
func warnExposed(logger *slog.Logger, clients ...*httpclient.Client) {
	for _, c := range clients {
		_, use := c.Uses()
		for _, file := range use.Secrets {
			if info, err := os.Stat(file); err == nil && info.Mode().Perm()&0o004 != 0 {
				logger.Warn("Every user of this host can read this file, which holds a secret: chmod o-r", "file", file)
			}
		}
	}
}
