package main

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	toolkit "github.com/prometheus/exporter-toolkit/web"
	"go.yaml.in/yaml/v2"
	"golang.org/x/time/rate"
)

// webConfigEvery is how often at most it is looked whether the files of a webConfig are others.
const webConfigEvery = time.Second

// webConfig is a web configuration file that is read again when it, or a file that it names, has
// changed: by a write, a rename, or a link that leads elsewhere. A bad one changes nothing.
// exporter-toolkit's own server reads and parses all of them for each connection, and the
// first for each request, which costs a proxy more than a scrape. It is safe for concurrent use.
type webConfig struct {
	file   string
	logger *slog.Logger
	good   prometheus.Gauge

	mu     sync.Mutex
	looked time.Time
	failed []fileID // what could not be used
	loaded *loadedWebConfig
}

// loadedWebConfig is what a file says.
type loadedWebConfig struct {
	tls     *tls.Config // nil without TLS
	headers map[string]string
	limiter *rate.Limiter // nil without a limit
	hasUser bool
	ids     []fileID
}

// fileID tells one content of a file from another.
type fileID struct {
	path string
	info os.FileInfo
}

func identify(paths ...string) []fileID {
	var ids []fileID
	for _, path := range paths {
		if path != "" {
			info, _ := os.Stat(path) // nil: there is none.
			ids = append(ids, fileID{path, info})
		}
	}
	return ids
}

func (a fileID) same(b fileID) bool {
	if a.info == nil || b.info == nil {
		return a.info == nil && b.info == nil && a.path == b.path
	}
	return os.SameFile(a.info, b.info) && a.info.ModTime().Equal(b.info.ModTime()) && a.info.Size() == b.info.Size()
}

// newWebConfig reads the file of an address, which the metric of the role names.
func newWebConfig(file, role, address string, logger *slog.Logger, r prometheus.Registerer) (*webConfig, error) {
	c := &webConfig{file: file, logger: logger, good: prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "promferry_" + role + "_web_config_last_reload_successful", Help: "Whether the web configuration file of an address could be used as it is now.",
		ConstLabels: prometheus.Labels{"address": address},
	})}
	loaded, err := c.load()
	if err != nil {
		return nil, err
	}
	c.loaded, c.looked = loaded, time.Now()
	c.good.Set(1)
	r.MustRegister(c.good)
	return c, nil
}

func (c *webConfig) load() (*loadedWebConfig, error) {
	if err := validateWebConfig(c.file); err != nil {
		return nil, err
	}
	content, err := os.ReadFile(c.file)
	if err != nil {
		return nil, err
	}
	// The defaults are exporter-toolkit's.
	config := toolkit.Config{TLSConfig: toolkit.TLSConfig{MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS13}}
	if err := yaml.UnmarshalStrict(content, &config); err != nil {
		return nil, errors.New("no web configuration") // It was one a moment ago.
	}
	t := &config.TLSConfig
	t.SetDirectory(filepath.Dir(c.file))
	loaded := &loadedWebConfig{
		headers: config.HTTPConfig.Header, hasUser: len(config.Users) > 0,
		ids: identify(c.file, t.TLSCertPath, t.TLSKeyPath, t.ClientCAs),
	}
	if config.RateLimiterConfig.Interval > 0 {
		loaded.limiter = rate.NewLimiter(rate.Every(config.RateLimiterConfig.Interval), config.RateLimiterConfig.Burst)
	}
	if !t.IsEnabled() {
		return loaded, nil
	}
	if loaded.tls, err = toolkit.ConfigToTLSConfig(t); err != nil {
		return nil, webConfigError(c.file, err)
	}
	certificate, err := loaded.tls.GetCertificate(nil)
	if err != nil {
		return nil, webConfigError(c.file, err)
	}
	loaded.tls.Certificates, loaded.tls.GetCertificate = []tls.Certificate{*certificate}, nil
	loaded.tls.NextProtos = []string{"http/1.1"} // A line cannot be made of an HTTP/2 stream.
	return loaded, nil
}

// now returns what is in force.
func (c *webConfig) now() *loadedWebConfig {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.looked) < webConfigEvery {
		return c.loaded
	}
	c.looked = time.Now()
	paths := make([]string, len(c.loaded.ids))
	for i, id := range c.loaded.ids {
		paths[i] = id.path
	}
	ids := identify(paths...)
	if slices.EqualFunc(ids, c.loaded.ids, fileID.same) || slices.EqualFunc(ids, c.failed, fileID.same) {
		return c.loaded
	}
	loaded, err := c.load()
	if err == nil && ((loaded.tls == nil) != (c.loaded.tls == nil) || loaded.hasUser != c.loaded.hasUser) {
		err = errors.New("switching TLS or basic_auth_users on or off needs a restart")
	}
	if err != nil {
		c.failed = ids
		c.good.Set(0)
		c.logger.Error("Web configuration not used, all stays as it was", "file", c.file, "err", err)
		return c.loaded
	}
	c.loaded, c.failed = loaded, nil
	c.good.Set(1)
	c.logger.Info("Web configuration in use", "file", c.file)
	return c.loaded
}

// wrap does for each request what the file says.
func (c *webConfig) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		now := c.now()
		if now.limiter != nil && !now.limiter.Allow() {
			http.Error(w, http.StatusText(http.StatusTooManyRequests), http.StatusTooManyRequests)
			return
		}
		for name, value := range now.headers {
			w.Header().Set(name, value)
		}
		next.ServeHTTP(w, r)
	})
}

// cacheConfig makes the server read its web configuration file in this way. With users it does
// not, as exporter-toolkit is who asks them.
func (s *server) cacheConfig(role, address string, r prometheus.Registerer) error {
	if s.config == "" || hasUsers(s.config) {
		return nil
	}
	var err error
	s.cached, err = newWebConfig(s.config, role, address, s.logger, r)
	return err
}

// serve is what server.Run does with this configuration.
func (c *webConfig) serve(s *server) error {
	s.logger.Info("Listening on", "address", s.listener.Addr().String())
	s.http.Handler = c.wrap(s.http.Handler)
	if c.now().tls == nil {
		s.logger.Info("TLS is disabled.", "address", s.listener.Addr().String())
		return s.http.Serve(s.listener)
	}
	s.logger.Info("TLS is enabled.", "address", s.listener.Addr().String())
	s.http.TLSConfig = &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.now().tls, nil },
	}
	return s.http.ServeTLS(s.listener, "", "")
}
