module github.com/promferry/promferry

go 1.26
